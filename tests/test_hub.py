"""Models on the hub: which files are meant, and how they come, out of an imitation on loopback."""

import asyncio
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

import hub as hub_module
import hub_download
from errors import ModelLoadFailed
from hub import Hub
from hub_download import HubFile, Progress, download
from hub_model import HubModel, parse, pick
from model_manager import ModelManager
from model_source import ModelSource
from settings import ServerSettings, TierSettings
from tests.hub_imitation import HubImitation, Repo, hub_imitation
from tests.test_model_manager import run, until
from tier import Tier

REPO = "owner/small-GGUF"
MODEL = HubModel(REPO, "Q4_K_M")
GGUF = "small-Q4_K_M.gguf"
CONTENT = bytes(range(256)) * 8192  # 2 MiB, more than a socket holds


@pytest.fixture(autouse=True)
def nothing_but_loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_download, "RETRY_PAUSES_S", (0.0, 0.0))
    yield
    huggingface_hub.close_session()  # which has its proxies and certificates from its first request


@pytest.fixture
def far() -> Iterator[HubImitation]:
    with hub_imitation() as imitation:
        imitation.repos[REPO] = Repo({GGUF: CONTENT, "README.md": b"?", "mmproj-F16.gguf": b"?"})
        yield imitation


@pytest.fixture
def near(far: HubImitation, tmp_path: Path) -> Hub:
    return Hub(far.endpoint, tmp_path / "hub", token=far.token)


def refusal(near: Hub, model: HubModel = MODEL, backend: str = "llamacpp", **how: Any) -> str:
    with pytest.raises(ModelLoadFailed) as caught:
        near.fetch(model, backend, **how)
    message = caught.value.message
    assert message.endswith(".")
    assert "\n" not in message
    assert str(near.cache) not in message
    assert near.token is None or near.token not in message
    return message


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


# names


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("models/small.gguf", None),
        ("/hf/small.gguf", None),
        ("", None),
        ("hf:a/b", HubModel("a/b")),
        ("hf:Org-1/name_2.5-GGUF:Q4_K_M", HubModel("Org-1/name_2.5-GGUF", "Q4_K_M")),
        ("hf:a/b:dir/file-00001-of-00002.gguf", HubModel("a/b", "dir/file-00001-of-00002.gguf")),
        ("hf:a/b@v1.0", HubModel("a/b", None, "v1.0")),
        ("hf:a/b@refs/pr/1:q8_0", HubModel("a/b", "q8_0", "refs/pr/1")),
    ],
)
def test_a_path_names_a_model_on_the_hub(text: str, model: HubModel | None) -> None:
    assert parse(text) == model


@pytest.mark.parametrize(
    "text",
    [
        "hf:", "hf:model", "hf://a/b", "hf:a/b/c", "hf:a/b:", "hf:a/b@", "hf:a/b@../x", "hf:../b",
        "hf:a/..", "hf:a/b:../../etc/passwd", "hf:a/b:/etc/passwd", "hf:a/b:x:y", "hf:a/b--c",
        "hf:a/b.git", "hf: a/b", "hf:a/b\n", f"hf:a/{'b' * 100}",
    ],
)  # fmt: skip
def test_what_is_meant_so_and_cannot_be_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(ValueError, match="hf:owner/repo:Q4_K_M"):
        parse(text)


# picking

SMALL = ["README.md", "s-Q4_K_M.gguf", "s-Q8_0.gguf", "s-IQ4_XS.gguf", "mmproj-s-Q8_0.gguf"]
SPLIT = [f"Q8_0/big-Q8_0-0000{n}-of-00003.gguf" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("what", "names", "picked"),
    [
        ("s-Q8_0.gguf", SMALL, ["s-Q8_0.gguf"]),
        ("Q8_0", SMALL, ["s-Q8_0.gguf"]),
        ("q8_0", SMALL, ["s-Q8_0.gguf"]),
        ("iq4_xs", SMALL, ["s-IQ4_XS.gguf"]),
        ("Q4_K", ["s-Q4_K_M.gguf", "s.Q4_K.gguf"], ["s.Q4_K.gguf"]),
        ("Q8_0", ["s_Q8_0.gguf", "s_IQ8_0.gguf"], ["s_Q8_0.gguf"]),
        ("a.gguf", ["x/a.gguf", "b.gguf"], ["x/a.gguf"]),
        ("a.gguf", ["x/a.gguf", "a.gguf"], ["a.gguf"]),
        (None, SMALL, ["s-Q4_K_M.gguf"]),
        (None, ["s-F16.gguf", "s-Q8_0.gguf"], ["s-Q8_0.gguf"]),
        (None, ["odd.gguf", "mmproj-F16.gguf", "imatrix.gguf"], ["odd.gguf"]),
        ("Q8_0", [*SPLIT, "s-Q4_0.gguf"], SPLIT),
        (SPLIT[0], SPLIT, SPLIT),
        (None, SPLIT, SPLIT),
        (
            "Q8_0",
            ["m3-Q8_0.gguf", "m3.heads.safetensors"],
            ["m3-Q8_0.gguf", "m3.heads.safetensors"],
        ),
        (
            "Q8_0",
            ["m3-Q8_0.gguf", "sparse_linear.pt", "colbert_linear.pt", "x/sparse_linear.pt"],
            ["m3-Q8_0.gguf", "colbert_linear.pt", "sparse_linear.pt"],
        ),
    ],
)
def test_the_gguf_that_is_meant(what: str | None, names: list[str], picked: list[str]) -> None:
    assert pick(HubModel("a/b", what), "llamacpp", names) == picked


@pytest.mark.parametrize(
    ("what", "names", "said"),
    [
        ("Q5_0", SMALL, "no models named 'Q5_0' on the hub: s-IQ4_XS.gguf, s-Q4_K_M.gguf, s-Q8_0"),
        ("Q4_XS", SMALL, "no models named 'Q4_XS'"),
        ("mmproj-s-Q8_0.gguf", SMALL, "no models named"),
        (SPLIT[1], SPLIT, f"Name one, such as hf:a/b:{SPLIT[0]}"),
        ("Q8_0", ["a-Q8_0.gguf", "b-Q8_0.gguf"], "several models named 'Q8_0'"),
        (None, ["a-Q8_0.gguf", "b-Q8_0.gguf"], "several models on the hub: a-Q8_0.gguf, b-Q8_0"),
        (None, ["odd.gguf", "odder.gguf"], "several models on the hub: odd.gguf, odder.gguf"),
        (None, ["model.safetensors"], r"no GGUF model on the hub \(model.safetensors\)"),
        ("Q8_0", SPLIT[:2], f"lacks {SPLIT[2]}"),
        ("x", [f"{n}.gguf" for n in range(30)], "and 10 more"),
    ],
)
def test_what_is_not_there_or_not_clear_is_an_error_that_lists_what_there_is(
    what: str | None, names: list[str], said: str
) -> None:
    with pytest.raises(ModelLoadFailed, match=said):
        pick(HubModel("a/b", what), "llamacpp", names)


BGE_M3 = {
    "config.json", "tokenizer.json", "tokenizer_config.json", "sentencepiece.bpe.model",
    "modules.json", "1_Pooling/config.json", "sparse_linear.pt", "colbert_linear.pt",
    "pytorch_model.bin",
}  # fmt: skip
NO_PART = {"README.md", "onnx/model.onnx", "imgs/a.jpg", "long.jpg", "onnx/tokenizer.json"}


def test_a_directory_is_what_such_a_model_needs_and_config_json_first() -> None:
    picked = pick(HubModel("a/b"), "flag", BGE_M3 | NO_PART)
    assert picked[0] == "config.json"
    assert sorted(picked) == sorted(BGE_M3)


def test_a_template_for_tools_is_a_part_of_a_directory() -> None:
    of_tools = "additional_chat_templates/tool_use.jinja"
    others = {"additional_chat_templates/rag.jinja", "chat_template.jinja"}
    assert of_tools in pick(HubModel("a/b"), "mlx", BGE_M3 | others | {of_tools})
    assert of_tools not in pick(HubModel("a/b"), "mlx", BGE_M3 | others)


def test_a_directory_has_weights_as_pickles_only_where_there_are_no_others() -> None:
    parts = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    picked = pick(HubModel("a/b"), "flag", BGE_M3 | parts | {"flax_model.msgpack"})
    assert set(picked) == BGE_M3 - {"pytorch_model.bin"} | parts


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"s-Q8_0.gguf"}, "set BACKEND=llamacpp"),
        (BGE_M3 - {"pytorch_model.bin"}, "no model directory"),
        (BGE_M3 - {"config.json"}, "no model directory"),
        ({"config.json", "model.safetensors"}, "no model directory"),
        (BGE_M3 | {"model-00001-of-00002.safetensors"}, "lacks model-00002-of-00002.safetensors"),
    ],
)
def test_a_repo_that_is_no_whole_directory_is_refused(names: set[str], said: str) -> None:
    with pytest.raises(ModelLoadFailed, match=said):
        pick(HubModel("a/b"), "flag", names)


@pytest.mark.parametrize("backend", ["mlx", "onnx"])
@pytest.mark.parametrize("tokenizer", ["tiktoken.model", "tokenizer.model", "vocab.txt"])
def test_a_repo_whose_tokenizer_is_another_is_refused_before_it_is_downloaded(
    backend: str, tokenizer: str
) -> None:
    names = {"config.json", "tokenizer_config.json", tokenizer, "model.safetensors"}
    with pytest.raises(ModelLoadFailed, match=r"it wants config\.json, tokenizer\.json and model"):
        pick(HubModel("a/b"), backend, names)
    assert set(pick(HubModel("a/b"), "flag", names)) == names
    names.add("tokenizer.json")
    assert set(pick(HubModel("a/b"), backend, names)) == names


# settings


def test_a_tier_knows_that_its_model_is_on_the_hub() -> None:
    tier = TierSettings(model_path="hf:a/b:Q8_0")
    assert tier.is_configured
    assert tier.hub_model == HubModel("a/b", "Q8_0")
    found = tier.at(Path("/cache/a.gguf"))
    assert (found.path, found.hub_model) == (Path("/cache/a.gguf"), None)
    assert TierSettings(model_path="models/a.gguf").hub_model is None


def test_the_cache_is_where_the_hubs_own_programs_have_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("DISK", "/disk")
    assert ServerSettings().hub.cache == tmp_path / ".cache/huggingface/hub"
    assert ServerSettings(hf_home="~/hf").hub.cache == tmp_path / "hf/hub"
    assert ServerSettings(hf_home="/hf", hf_hub_cache="$DISK/x").hub.cache == Path("/disk/x")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert ServerSettings().hub.cache == Path("/xdg/huggingface/hub")
    assert ServerSettings(hf_endpoint="http://x/").hub.endpoint == "http://x"
    assert "secret" not in repr(ServerSettings(hf_token="secret").hub)


def test_home_offline_and_endpoint_from_the_environment_hold_for_a_download(
    far: HubImitation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", far.endpoint)
    monkeypatch.setenv("HF_TOKEN", far.token)
    path = ServerSettings().hub.fetch(MODEL, "llamacpp")
    assert path.is_relative_to(tmp_path / "home/hub/models--owner--small-GGUF/snapshots")
    assert {request.token for request in far.requests} == {far.token}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert ServerSettings().hub.fetch(MODEL, "llamacpp") == path
    assert "HF_HUB_OFFLINE" in refusal(ServerSettings().hub, HubModel("a/other"))
    assert len(far.requests) == 2


# download


def test_a_model_is_downloaded_once_and_lies_where_the_library_finds_it(
    far: HubImitation, near: Hub
) -> None:
    assert near.cached(MODEL, "llamacpp") is None
    path = near.fetch(MODEL, "llamacpp")
    assert path.name == GGUF
    assert path.read_bytes() == CONTENT
    assert near.cached(MODEL, "llamacpp") == path
    assert near.cached(HubModel(REPO), "llamacpp") == path
    n_requests = len(far.requests)
    assert near.fetch(MODEL, "llamacpp") == path
    assert len(far.requests) == n_requests == 2
    found = huggingface_hub.try_to_load_from_cache(REPO, GGUF, near.cache)
    assert isinstance(found, str)
    assert Path(found) == path
    offline = replace(near, is_offline=True)
    assert offline.fetch(MODEL, "llamacpp") == path
    assert "is not in the hub's cache" in refusal(offline, HubModel(REPO, "Q8_0"))


def test_what_the_library_has_downloaded_is_not_downloaded_again(
    far: HubImitation, near: Hub
) -> None:
    near.fetch(MODEL, "llamacpp")
    shutil.rmtree(near.cache / "models--owner--small-GGUF/snapshots")  # as of a commit before
    near.fetch(MODEL, "llamacpp")
    assert len(far.contents()) == 1


def test_progress_rises_to_the_end(near: Hub) -> None:
    seen: list[float] = []
    near.fetch(MODEL, "llamacpp", seen.append)
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0.0, 1.0)
    assert len(seen) > 3


def test_a_connection_that_breaks_is_taken_up_where_it_was(far: HubImitation, near: Hub) -> None:
    far.cut_after = [500_000, 700_000]
    path = near.fetch(MODEL, "llamacpp")
    assert path.read_bytes() == CONTENT
    assert [r.range for r in far.contents()] == [None, "bytes=500000-", "bytes=1200000-"]


def test_a_download_that_broke_off_goes_on_at_the_next_request(
    far: HubImitation, near: Hub
) -> None:
    far.cut_after = [1_048_576, 0, 0, 0]
    message = refusal(near)
    assert "broke off at 50 %" in message
    assert "the next request goes on from there" in message
    assert near.cached(MODEL, "llamacpp") is None
    assert names_in(near.cache / "models--owner--small-GGUF") == {
        f"{far.repos[REPO].hash(GGUF)}.incomplete"
    }
    far.requests.clear()
    seen: list[float] = []
    assert near.fetch(MODEL, "llamacpp", seen.append).read_bytes() == CONTENT
    assert [r.range for r in far.contents()] == ["bytes=1048576-"]
    assert 0.5 in seen


def test_a_hub_that_knows_no_ranges_sends_all_of_it_again(far: HubImitation, near: Hub) -> None:
    far.cut_after, far.ignores_ranges = [500_000], True
    seen: list[float] = []
    assert near.fetch(MODEL, "llamacpp", seen.append).read_bytes() == CONTENT
    assert seen[-1] == 1.0


def test_a_hub_that_is_busy_for_a_moment_is_asked_again(far: HubImitation, near: Hub) -> None:
    far.busy = 2
    assert near.fetch(MODEL, "llamacpp").read_bytes() == CONTENT
    assert len(far.contents()) == 3


def test_a_download_that_nobody_wants_any_more_stops_and_goes_on_later(
    far: HubImitation, near: Hub
) -> None:
    seen: list[float] = []
    message = refusal(near, on_progress=seen.append, is_wanted=lambda: seen[-1] < 0.25)
    assert "was stopped at" in message
    assert seen[-1] < 1
    assert near.cached(MODEL, "llamacpp") is None
    near.fetch(MODEL, "llamacpp")
    assert far.contents()[-1].range == f"bytes={round(seen[-1] * len(CONTENT))}-"


def test_a_file_with_another_hash_is_deleted(far: HubImitation, near: Hub) -> None:
    far.spoil = {GGUF}
    assert "has not the hash that the hub names" in refusal(near)
    assert names_in(near.cache / "models--owner--small-GGUF") == set()
    assert near.cached(MODEL, "llamacpp") is None
    far.spoil = set()
    assert near.fetch(MODEL, "llamacpp").read_bytes() == CONTENT


def test_a_damaged_beginning_is_noticed_at_the_end_and_deleted(
    far: HubImitation, near: Hub
) -> None:
    part = near.cache / "models--owner--small-GGUF/blobs" / far.repos[REPO].hash(GGUF)
    part.parent.mkdir(parents=True)
    part.with_suffix(".incomplete").write_bytes(b"x" * 1000)
    assert "came damaged" in refusal(near)
    assert names_in(part.parent) == set()


def test_a_beginning_that_is_longer_than_the_file_is_thrown_away(
    far: HubImitation, near: Hub
) -> None:
    part = near.cache / "models--owner--small-GGUF/blobs" / far.repos[REPO].hash(GGUF)
    part.parent.mkdir(parents=True)
    part.with_suffix(".incomplete").write_bytes(CONTENT + b"x")
    assert near.fetch(MODEL, "llamacpp").read_bytes() == CONTENT


def test_a_file_that_goes_on_beyond_its_size_is_not_read_to_its_end(
    far: HubImitation, tmp_path: Path
) -> None:
    file, seen = HubFile(GGUF, 1000, "0" * 64), Progress(REPO, 1000, lambda _: None, lambda: True)
    url = f"{far.endpoint}/{REPO}/resolve/{far.repos[REPO].commit}/{GGUF}"
    with pytest.raises(ModelLoadFailed, match="came damaged"):
        download(url, {}, file, tmp_path / "part", seen)
    assert seen.percent < 100 * len(CONTENT) / 1000 / 2


def test_what_another_writes_counts_once_however_often_it_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "part").write_bytes(b"x" * 30)
    seen: list[float] = []
    progress = Progress(REPO, 100, seen.append, lambda: True)
    for name in ("none", "part", "part"):
        progress.beside(tmp_path / name)
    assert seen == [0.0, 0.0, 0.3, 0.3]


def test_a_pause_ends_when_nobody_wants_more(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(hub_download.time, "sleep", slept.append)
    wanted = iter([True, True, False])
    with pytest.raises(ModelLoadFailed, match="was stopped at 0 %"):
        Progress(REPO, 100, lambda _: None, lambda: next(wanted)).pause(60)
    assert slept == [0.1, 0.1]


def test_where_there_are_no_links_a_file_gets_its_name_itself(
    near: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "symlink_to", refuse)
    path = near.fetch(MODEL, "llamacpp")
    assert path.read_bytes() == CONTENT
    assert near.cached(MODEL, "llamacpp") == path
    assert names_in(near.cache / "models--owner--small-GGUF/blobs") == set()


def test_the_hash_of_a_file_that_is_in_git_is_checked_too(far: HubImitation, near: Hub) -> None:
    far.repos["a/b"] = Repo({name: name.encode() for name in BGE_M3})
    far.spoil = {"config.json"}
    assert "config.json of a/b came damaged" in refusal(near, HubModel("a/b"), "flag")


Usage = namedtuple("Usage", "total used free")


def test_without_the_disk_space_no_byte_is_asked_for(
    far: HubImitation, near: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    far.cut_after = [1_097_152, 0, 0, 0]
    refusal(near)
    far.requests.clear()
    margin = hub_module.DISK_MARGIN_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, margin + 999_999))
    message = refusal(near)
    assert "needs 1.0 MB more" in message
    assert "269.4 MB are free" in message
    assert far.contents() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, margin + 1_000_000))
    near.fetch(MODEL, "llamacpp")


def test_a_disk_that_fills_up_meanwhile_is_named(
    near: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_download.os, "fsync", fsync)
    assert "The disk is full" in refusal(near)


def test_a_cache_that_cannot_be_written_is_named(near: Hub) -> None:
    near.cache.write_text("a file")
    assert "set HF_HOME or HF_HUB_CACHE" in refusal(near)


def test_a_file_too_large_for_http_is_left_to_the_hubs_own_program(
    far: HubImitation, near: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "MOST_HTTP_BYTES", 1000)
    assert f"`hf download {REPO} {GGUF}`" in refusal(near)


# several files


def test_a_split_model_is_there_when_all_its_parts_are(far: HubImitation, near: Hub) -> None:
    parts = {name: name.encode() * 100 for name in SPLIT}
    far.repos["a/big"] = Repo(parts | {"Q8_0/sparse_linear.pt": b"head", "x-Q4_0.gguf": b"?"})
    model = HubModel("a/big", "q8_0")
    path = near.fetch(model, "llamacpp")
    assert path.name == "big-Q8_0-00001-of-00003.gguf"
    for name, content in parts.items():
        assert path.with_name(name.rpartition("/")[2]).read_bytes() == content
    assert path.with_name("sparse_linear.pt").read_bytes() == b"head"
    assert near.cached(model, "llamacpp") == path
    path.with_name("big-Q8_0-00002-of-00003.gguf").unlink()
    assert near.cached(model, "llamacpp") is None


def test_a_model_is_not_there_before_its_heads_are(far: HubImitation, near: Hub) -> None:
    far.repos["a/m3"] = Repo({"m3-Q8_0.gguf": CONTENT, "m3.heads.safetensors": b"heads"})
    model = HubModel("a/m3")
    far.cut_after = [len(CONTENT), 0, 0, 0]
    assert "broke off at 99 %" in refusal(near, model)
    assert near.cached(model, "llamacpp") is None
    near.fetch(model, "llamacpp")
    assert [r.path.rpartition("/")[2] for r in far.contents()[4:]] == ["m3.heads.safetensors"]


def test_a_directory_for_flag_is_there_when_all_of_it_is(far: HubImitation, near: Hub) -> None:
    far.repos["a/m3"] = Repo({name: name.encode() for name in BGE_M3 | NO_PART})
    model = HubModel("a/m3", revision="main")
    far.cut_after = [10**9] * 4 + [0] * 3
    refusal(near, model, "flag")
    assert near.cached(model, "flag") is None
    path = near.fetch(model, "flag")
    found = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert found == BGE_M3
    assert (path / "1_Pooling/config.json").read_text() == "1_Pooling/config.json"
    assert near.cached(HubModel("a/m3"), "flag") == path
    assert len({r.path for r in far.contents()}) == len(BGE_M3)


def left_by_another_program(far: HubImitation, near: Hub, name: str, files: set[str]) -> Path:
    """These files of a repo in the cache, as the library puts them there. Their snapshot."""
    repo, folder = far.repos[name], near.cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / repo.commit
    for file in files:
        blob = folder / "blobs" / repo.hash(file)
        for path in (blob, snapshot / file):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(repo.files[file])
        (snapshot / file).symlink_to(os.path.relpath(blob, (snapshot / file).parent))
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(repo.commit)
    return snapshot


PARTIAL = {"config.json", "tokenizer.json", "pytorch_model.bin"}  # enough for transformers


def test_what_another_program_has_left_out_is_fetched(far: HubImitation, near: Hub) -> None:
    far.repos["a/m3"] = Repo({name: name.encode() for name in BGE_M3 | NO_PART})
    snapshot = left_by_another_program(far, near, "a/m3", PARTIAL)
    model = HubModel("a/m3")
    assert near.cached(model, "flag") is None
    far.repos["a/m3"].revisions = frozenset()  # its main is another commit by now
    assert near.fetch(model, "flag") == snapshot
    assert names_in(snapshot) == {name.rpartition("/")[2] for name in BGE_M3}
    assert len(far.contents()) == len(BGE_M3 - PARTIAL)
    n_requests = len(far.requests)
    assert near.cached(model, "flag") == near.fetch(model, "flag") == snapshot
    assert len(far.requests) == n_requests


def test_what_another_program_has_left_is_whole_where_nobody_can_say_more(
    far: HubImitation, near: Hub
) -> None:
    far.repos["a/m3"] = Repo({name: name.encode() for name in BGE_M3 | NO_PART})
    snapshot = left_by_another_program(far, near, "a/m3", PARTIAL)
    model = HubModel("a/m3")
    assert replace(near, is_offline=True).cached(model, "flag") == snapshot
    assert replace(near, endpoint="http://127.0.0.1:1").fetch(model, "flag") == snapshot
    far.repos["a/m3"].gate, far.repos["a/m3"].hides_listing = (403, "GatedRepo"), True
    assert replace(near, token="hf_other").fetch(model, "flag") == snapshot


def refuse(*_: Any) -> None:
    raise OSError(30, "Read-only file system")


def test_what_cannot_be_added_to_what_is_there_is_done_without(
    far: HubImitation, near: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    far.repos["a/m3"] = Repo({name: name.encode() for name in BGE_M3 | NO_PART})
    snapshot = left_by_another_program(far, near, "a/m3", PARTIAL)

    with monkeypatch.context() as patch:
        patch.setattr(Hub, "_fetch_file", refuse)
        assert near.fetch(HubModel("a/m3"), "flag") == snapshot
        with pytest.raises(ModelLoadFailed):
            near.fetch(HubModel("a/m3"), "flag", is_wanted=lambda: False)
    assert near.fetch(HubModel("a/m3"), "flag") == snapshot
    assert names_in(snapshot) == {name.rpartition("/")[2] for name in BGE_M3}


@pytest.mark.parametrize("record", ["null", "3", "[1]", "{", ""])
def test_a_record_that_is_none_is_asked_for_anew(far: HubImitation, near: Hub, record: str) -> None:
    far.repos["a/m3"] = Repo({name: name.encode() for name in BGE_M3 | NO_PART})
    model = HubModel("a/m3")
    snapshot = near.fetch(model, "flag")
    here = near._here(model, "flag")
    assert here
    near._names_file(here.model).write_text(record)
    assert near.cached(model, "flag") is None
    assert near.fetch(model, "flag") == snapshot
    assert near.cached(model, "flag") == snapshot


def test_the_quant_that_is_here_is_not_fetched_in_another(far: HubImitation, near: Hub) -> None:
    other = "small-Q8_0.gguf"
    far.repos[REPO].files |= {other: b"another", "small.heads.safetensors": b"heads"}
    left_by_another_program(far, near, REPO, {other})
    path = near.fetch(HubModel(REPO), "llamacpp")
    assert path.name == other
    assert names_in(path.parent) == {other, "small.heads.safetensors"}
    assert near.cached(HubModel(REPO), "llamacpp") == path


def test_a_cache_that_others_fill_need_not_be_writable(
    far: HubImitation, near: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    far.repos["a/m3"] = Repo({name: name.encode() for name in BGE_M3 | NO_PART})
    snapshot = left_by_another_program(far, near, "a/m3", BGE_M3)

    monkeypatch.setattr(hub_module, "_write", refuse)
    assert near.fetch(HubModel("a/m3"), "flag") == snapshot


def test_two_tiers_that_want_the_same_file_download_it_once(far: HubImitation, near: Hub) -> None:
    both_ask = threading.Event()
    far.on_content = lambda: both_ask.wait(10) and None
    found: list[Path] = []
    seen: list[float] = []

    def second_progress(fraction: float) -> None:
        seen.append(fraction)
        if len(seen) > 2:  # it waits, and looks at what the first one has
            both_ask.set()

    first = threading.Thread(target=lambda: found.append(near.fetch(MODEL, "llamacpp")))
    first.start()
    while not far.contents():
        first.join(0.005)
    found.append(near.fetch(MODEL, "llamacpp", second_progress))
    first.join(10)
    assert len(far.contents()) == 1
    assert found[0] == found[1]
    assert found[0].read_bytes() == CONTENT
    assert seen[-1] == 1.0


def test_who_waits_for_anothers_download_can_stop_too(far: HubImitation, near: Hub) -> None:
    go_on = threading.Event()
    far.on_content = lambda: go_on.wait(10) and None
    first = threading.Thread(target=near.fetch, args=(MODEL, "llamacpp"))
    first.start()
    while not far.contents():
        first.join(0.005)
    asked: list[int] = []
    assert "was stopped at 0 %" in refusal(
        near, is_wanted=lambda: asked.append(1) or len(asked) < 3
    )
    go_on.set()
    first.join(10)
    assert near.cached(MODEL, "llamacpp")


# by a tier


def asking_for(far: HubImitation, near: Hub) -> dict[str, Any]:
    server = {"hf_endpoint": far.endpoint, "hf_hub_cache": str(near.cache)}
    return {"server": server, "light": TierSettings(model_path=f"hf:{REPO}")}


def held_back_in_the_middle(far: HubImitation) -> threading.Event:
    """The hub breaks off after half of the file, and tells the rest when this is set."""
    go_on = threading.Event()
    far.cut_after = [1_048_576]
    far.on_content = lambda: None if far.cut_after else go_on.wait(10) and None
    return go_on


def is_in_the_middle(tier: Tier, far: HubImitation) -> bool:
    return tier.life.progress == 0.5 and len(far.contents()) == 2


async def leave(request: "asyncio.Task[None]") -> None:
    request.cancel()
    await asyncio.wait([request])


def test_a_download_that_everybody_left_goes_on_with_the_next_request(
    far: HubImitation, near: Hub
) -> None:
    go_on = held_back_in_the_middle(far)

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        request = asyncio.create_task(tier.fetched())
        await until(lambda: is_in_the_middle(tier, far))
        assert tier.state == "downloading"
        await leave(request)
        go_on.set()
        await until(lambda: tier.state == "stopped")
        assert not tier.is_downloaded
        await tier.fetched()
        assert tier.is_downloaded

    run(test, **asking_for(far, near))


def test_a_load_that_everybody_left_while_it_downloads_has_not_failed(
    far: HubImitation, near: Hub
) -> None:
    go_on = held_back_in_the_middle(far)

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        loading = asyncio.create_task(tier.load())
        await until(lambda: is_in_the_middle(tier, far))
        await leave(loading)
        go_on.set()
        await until(lambda: tier.state == "stopped")
        assert "was stopped at" in (tier.life.reason or "")
        with pytest.raises(ModelLoadFailed, match=GGUF):  # it is here, and no model
            await tier.load()
        assert tier.is_downloaded
        assert tier.state == "failed"

    run(test, **asking_for(far, near))


def test_who_comes_while_a_download_stops_does_not_fail_with_it(
    far: HubImitation, near: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_heard_no, goes_on = threading.Event(), threading.Event()
    n_fetches = 0

    def fetch(_: Any, on_progress: Any, is_wanted: Callable[[], bool]) -> None:
        nonlocal n_fetches
        n_fetches += 1
        if n_fetches == 1:
            while is_wanted():
                time.sleep(0.001)
            has_heard_no.set()
            goes_on.wait(10)
            raise ModelLoadFailed("It was stopped.")

    async def test(manager: ModelManager) -> None:
        tier = manager.tiers["light"]
        first = asyncio.create_task(tier.fetched())
        await until(lambda: n_fetches)
        await leave(first)
        await until(has_heard_no.is_set)
        second = asyncio.create_task(tier.fetched())
        await until(lambda: tier.is_wanted)
        goes_on.set()
        await second

    monkeypatch.setattr(ModelSource, "fetch", fetch)
    run(test, **asking_for(far, near))
    assert n_fetches == 2


# who may have it


@pytest.mark.parametrize(
    ("gate", "token", "said"),
    [
        (
            (401, "GatedRepo"),
            None,
            "accept its conditions on its page on the hub; then it wants your",
        ),
        ((403, "GatedRepo"), "hf_other", "it wants an HF_TOKEN whose account may read it"),
        ((403, ""), "hf_other", "it wants an HF_TOKEN"),
        ((401, ""), None, "if it is private, set HF_TOKEN"),
        ((401, ""), "hf_other", "check whether HF_TOKEN is right"),
        ((404, "RepoNotFound"), None, "is not on the hub, or private"),
        ((418, ""), None, "The hub answers with status 418"),
    ],
)
@pytest.mark.parametrize("hides_listing", [False, True])
def test_a_refusal_says_what_to_do(
    far: HubImitation, near: Hub, monkeypatch: pytest.MonkeyPatch, gate: Any, token: str | None,
    said: str, hides_listing: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    far.repos[REPO].gate, far.repos[REPO].hides_listing = gate, hides_listing
    assert said in refusal(replace(near, token=token))
    assert near.fetch(MODEL, "llamacpp").read_bytes() == CONTENT


def test_what_is_not_on_the_hub_is_named(far: HubImitation, near: Hub) -> None:
    assert "a/nothing is not on the hub" in refusal(near, HubModel("a/nothing"))
    assert "no revision 'v9'" in refusal(near, replace(MODEL, revision="v9"))
    assert f"no models named 'Q8_0' on the hub: {GGUF}" in refusal(near, HubModel(REPO, "Q8_0"))


def test_a_revision_is_kept_apart_from_main(far: HubImitation, near: Hub) -> None:
    far.repos[REPO].revisions |= {"refs/pr/1"}
    model = replace(MODEL, revision="refs/pr/1")
    near.fetch(model, "llamacpp")
    assert near.cached(model, "llamacpp")
    assert near.cached(MODEL, "llamacpp") is None
    commit = replace(MODEL, revision=far.repos[REPO].commit)
    assert near.cached(commit, "llamacpp") == near.cached(model, "llamacpp")


def test_the_token_does_not_go_where_the_hub_redirects_to(far: HubImitation, near: Hub) -> None:
    with hub_imitation() as storage:
        storage.repos = far.repos
        far.storage = storage.endpoint
        far.cut_after, storage.cut_after = [], [500_000]
        assert near.fetch(MODEL, "llamacpp").read_bytes() == CONTENT
        assert [(r.token, r.range) for r in storage.requests] == [
            (None, None), (None, "bytes=500000-"),
        ]  # fmt: skip
    assert {request.token for request in far.requests} == {far.token}


def test_a_hub_out_of_reach_and_a_page_in_its_place_are_told_apart(
    far: HubImitation, near: Hub
) -> None:
    far.repos["a/page"] = Repo({})
    far.repos["a/page"].info = lambda: {"siblings": "<html>"}  # type: ignore[method-assign]
    assert "check HF_ENDPOINT" in refusal(near, HubModel("a/page"))
    gone = replace(near, endpoint="http://127.0.0.1:1")
    assert "cannot be reached to fetch owner/small-GGUF (Conn" in refusal(gone)


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that nobody knows, and its key."""
    path = tmp_path / "certificate.pem"
    command = (
        f"req -x509 -newkey rsa:2048 -nodes -days 2 -keyout {path}.key -out {path} "
        "-subj /CN=loopback -addext subjectAltName=IP:127.0.0.1"
    )
    openssl = shutil.which("openssl") or pytest.skip("no openssl")
    subprocess.run([openssl, *command.split()], check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.key").read_text())
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    return path


def test_a_certificate_that_is_not_trusted_is_named(certificate: Path, near: Hub) -> None:
    with hub_imitation(certificate) as far:
        said = refusal(replace(near, endpoint=far.endpoint))
    assert "its certificate is not trusted: self" in said
    assert "SSL_CERT_FILE" in said


@pytest.mark.skipif(sys.platform != "linux", reason="others keep certificates elsewhere")
def test_what_the_system_trusts_holds_for_the_bytes_too(
    certificate: Path, near: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = ssl.DefaultVerifyPaths(None, None, "", "/nowhere", "", "/nowhere")
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: nowhere)
    monkeypatch.setattr("httpcore2._ssl.CA_FILE_CANDIDATES", [certificate])
    monkeypatch.setattr("truststore._openssl._CA_FILE_CANDIDATES", [certificate])
    with hub_imitation(certificate) as far:
        far.repos[REPO] = Repo({GGUF: CONTENT})
        path = replace(near, endpoint=far.endpoint).fetch(MODEL, "llamacpp")
    assert path.read_bytes() == CONTENT


def test_a_socks_proxy_wants_a_package(near: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "socksio", None)
    hub = replace(near, endpoint="http://hub.invalid")
    assert "`.venv/bin/pip install socksio`" in refusal(hub)


@pytest.mark.parametrize("name", ["../../../escaped.gguf", "/escaped.gguf", "a/../x.gguf"])
def test_no_name_and_no_hash_that_a_hub_gives_leads_out_of_the_cache(
    far: HubImitation, near: Hub, name: str
) -> None:
    far.repos["a/evil"] = Repo({name: CONTENT})
    assert "has no GGUF model on the hub (nothing)" in refusal(near, HubModel("a/evil"))
    far.repos["a/evil"] = Repo({GGUF: CONTENT}, commit="../../../escaped")
    assert "check HF_ENDPOINT" in refusal(near, HubModel("a/evil"))


def test_importing_the_server_does_not_import_the_library() -> None:
    code = "import sys, server; print('huggingface_hub' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
