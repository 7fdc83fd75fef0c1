"""The comparison with other servers: what its client reads, what becomes of rounds, its page."""

import asyncio
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench import api_cost, busy, compare, growth, own_service, performance_page
from bench.plain_client import Client, NoMeasurement, Reply
from bench.scenarios import FIGURES, SCENARIOS, asking, words
from bench.servers import LLAMA_SERVER, OURS, Setup
from engine.model_file import read_model_file
from settings import ROOT
from tests.gguf_fixtures import write_tiny_spm

EVENTS = (
    b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"b"}}]}\n\n',
    b'data: {"choices":[],"usage":{"completion_tokens":2,"prompt_tokens":9,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}\n\ndata: [DONE]\n\n',
)
ABOUT: dict[str, Any] = {
    "date": "2026-01-02", "versions": {"python": "3.10"}, "model": "tiny.gguf", "threads": 2,
    "slots": 16, "cells": 16384,
    "machine": {
        "cpu": "CPU", "vectors": "AVX2", "cores": 2, "memory_gb": 8, "system": "Linux",
    },
}  # fmt: skip


def cold(*rounds: tuple[float, float]) -> dict[str, Any]:
    key = "cold_first_token_ms"
    found = [{OURS: {key: ours}, LLAMA_SERVER: {key: theirs}} for ours, theirs in rounds]
    return {"about": ABOUT, "rounds": found}


def test_a_reply_is_read_with_the_times_of_its_texts() -> None:
    reply = Reply().read(list(enumerate(EVENTS)))
    assert (reply.text, reply.text_at_s) == ("ab", [1, 2])
    assert (reply.n_tokens, reply.n_prompt, reply.n_cached) == (2, 9, 4)
    assert (reply.first_token_s, reply.gaps_s(), reply.gaps_s(since_s=2)) == (1, [1], [])


@pytest.mark.parametrize("n", [1, 7, 50])
def test_an_event_counts_when_its_last_byte_has_come(n: int) -> None:
    data = b"".join(EVENTS)
    pieces = [(float(at), data[at : at + n]) for at in range(0, len(data), n)]
    reply = Reply().read(pieces)
    assert (reply.text, reply.n_tokens) == ("ab", 2)
    assert reply.text_at_s[0] + n > len(EVENTS[0] + EVENTS[1]) - 2


def test_a_server_that_counts_nothing_has_its_pieces_counted() -> None:
    assert Reply().read([(0.0, b"".join(EVENTS[:3]))]).n_tokens == 2


def test_an_error_in_a_stream_is_no_measurement() -> None:
    with pytest.raises(NoMeasurement, match="too much"):
        Reply().read([(0.0, b'data: {"error":{"message":"too much"}}\n')])


def test_no_two_seeds_ask_the_same() -> None:
    assert words("a", 30) == words("a", 30) != words("b", 30)
    assert [m["role"] for m in asking("a", 3, "Be short.")] == ["system", "user"]


def test_a_stream_is_back_when_it_is_as_fast_as_at_its_end() -> None:
    slow = [at / 10 for at in range(20)]
    fast = [2 + at / 100 for at in range(400)]
    assert busy.recovery_s([*slow, *fast], 0.0, 6.0) == 2.0
    assert busy.recovery_s(fast, 2.0, 6.0) == 0.0
    assert busy.recovery_s([], 2.0, 6.0) == 4.0


def test_what_keeps_the_cores_busy_ends_with_the_measurement() -> None:
    before = set(psutil.Process().children())
    with busy.busy_processes(2, 60):
        children = set(psutil.Process().children()) - before
        assert len(children) == 2
    assert not any(child.is_running() for child in children)


def test_a_ratio_is_of_one_round_and_the_table_has_the_median() -> None:
    report = {"cold": cold((100, 200), (300, 300), (50, 10))}
    head, _, row, *_ = performance_page.table_rows(report)
    assert head == f"| What | Quintet | {LLAMA_SERVER} | Quintet / {LLAMA_SERVER} | Goal |"
    assert row.endswith("| 100 | 200 | 1.00 (0.50 to 5.00) | at most 1.05 |")


def test_a_run_replaces_only_what_it_has_measured(tmp_path: Path) -> None:
    begin, end = performance_page.BEGIN, performance_page.END
    page = tmp_path / "performance.md"
    page.write_text(f"# Title\n{begin}\nWas there.\n{end}\nAfter.\n")
    start = {"about": ABOUT, "rounds": [{OURS: {"start_ready_s": 0.5}}]}
    performance_page.write(tmp_path, {"start": start, "cold": cold((1, 1))})
    performance_page.write(tmp_path, {"cold": cold((2, 1))})
    text = page.read_text()
    assert text.startswith(f"# Title\n{begin}\n")
    assert text.endswith(f"{end}\nAfter.\n")
    assert "Was there." not in text
    assert "| 2.00 (2.00 to 2.00) |" in text
    assert "server ready, s | 0.50 |" in text


def test_the_page_shows_what_was_measured() -> None:
    docs = ROOT / "docs"
    report = json.loads((docs / "performance.json").read_text())
    page = (docs / "performance.md").read_text(encoding="utf-8")
    rows = [*performance_page.table_rows(report), *performance_page.picture_rows(docs)]
    shown = page.partition(performance_page.BEGIN)[2].partition(performance_page.END)[0]
    assert shown == "\n\n" + "\n".join(rows) + "\n\n"


def test_pictures_are_text_and_small(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    key = "streams_{}"
    rounds = [{OURS: {key.format(n): 10.0 * n for n in (1, 4, 8, 16)}}]
    (tmp_path / "performance.md").write_text(performance_page.BEGIN + performance_page.END)
    performance_page.write(tmp_path, {"streams": {"about": ABOUT, "rounds": rounds}})
    picture = (tmp_path / "pictures" / "streams.svg").read_text()
    assert "tokens/s together" in picture
    assert "(pictures/streams.svg)" in (tmp_path / "performance.md").read_text()


def test_what_grows_has_a_picture_for_each_way(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = growth.measure(Setup(None, 2), "a", growth.QUICK)
    assert len(found) == len(growth.AXES) * len(growth.KINDS) * 2
    assert all(value > 0 or "tokens_per_s" in key for key, value in found.items()), found
    (tmp_path / "performance.md").write_text(performance_page.BEGIN + performance_page.END)
    performance_page.write(tmp_path, {"growth": {"about": ABOUT, "rounds": [{OURS: found}]}})
    text = (tmp_path / "performance.md").read_text()
    for axis, about in growth.AXES.items():
        assert f"(pictures/growth_{axis}.svg)" in text
        picture = (tmp_path / "pictures" / f"growth_{axis}.svg").read_text()
        assert all(name in picture for name in (about, *growth.KINDS.values()))


def test_a_model_is_made_to_take_longer_prompts(tmp_path: Path) -> None:
    path = write_tiny_spm(tmp_path / "tiny.gguf")
    (tmp_path / "copy").mkdir()
    known, copy = (
        read_model_file(file)
        for file in (path, growth.for_longer_prompts(path, 16384, tmp_path / "copy"))
    )
    assert copy == replace(known, path=copy.path, n_ctx_train=16384)


def test_all_scenarios_run_on_a_service_of_their_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert compare.main(["--quick", "--only", ",".join([*SCENARIOS, "start"])]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == [*SCENARIOS, "start"]
    for name, part in report.items():
        (found,) = part["rounds"]
        known = SCENARIOS[name].metrics if name in SCENARIOS else FIGURES[name]
        assert found[OURS].keys() <= known.keys()
        for key, value in found[OURS].items():
            is_gap = key.endswith(("gap_ms", "gap_p99_ms"))  # of tokens that may come at once
            assert value > 0 or (is_gap and value == 0), found


def test_the_cost_of_a_token_and_of_a_request_are_found() -> None:
    with api_cost.serving(2, step_ms=2) as (url, process):
        rate, token_s = asyncio.run(api_cost.Streams(url, 2).measure(process, 0.5))
        assert rate > 0
        assert token_s >= 0  # the system's clock may be too coarse for so little
        assert asyncio.run(api_cost.request_cpu_s(url, process, 100)) > 0
        with pytest.raises(NoMeasurement, match="400"):  # it was refused
            asyncio.run(Client(url).chat(asking("a", 3), -5))


def test_a_server_that_does_not_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(own_service, "END_S", 0.2)
    ready = tmp_path / "ready"
    code = (
        "import pathlib, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"pathlib.Path({str(ready)!r}).touch(); signal.pause()"
    )
    with own_service.running([sys.executable, "-c", code], "", lambda _: ready.exists()) as process:
        pass
    assert process.returncode == -signal.SIGKILL
    assert "does not end" in capsys.readouterr().err
