"""The benchmark of embeddings: what it compares, and that it ends by itself."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench import encoder_runtimes, encoders
from bench.encoder_runtimes import Turn
from tests import encoder_fixtures as tiny


def test_texts_are_of_the_same_mixed_lengths_and_never_the_same() -> None:
    first, again, other = (encoders.mixed_texts(seed, 256) for seed in ("a", "a", "b"))
    assert first == again
    assert not set(first) & set(other)
    lengths = [len(text.split()) for text in first]
    assert lengths == [len(text.split()) for text in other]
    assert (min(lengths) < 5, max(lengths) > 150) == (True, True)


def test_a_report_is_of_ratios_within_a_round() -> None:
    speeds = {
        "bulk": [90.0, 45.0, 100.0], "bulk, bare": [100.0, 50.0, 100.0],
        "singles": [50.0], "singles, bare": [100.0], "triple": [45.0, 45.0, 80.0],
    }  # fmt: skip
    bulk, singles, triple = encoders.report(speeds)
    assert "one request / bare loop" in bulk
    assert " 0.900  (rounds 0.900 to 1.000; 90 and 100 tokens/s)" in bulk
    assert " 0.500 " in singles
    assert " 0.800 " in triple


@pytest.mark.real
def test_it_measures_a_model_through_a_service_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "PAUSE_S", 0.01)
    path = tiny.write_embedder(tmp_path / "tiny.gguf")
    assert encoders.main([str(path), "--texts", "6", "--singles", "3", "--rounds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(" tokens/s)" in line or " ms)" in line for line in lines)


# other runtimes


def words(text: str) -> list[int]:
    return [len(word) for word in text.split()]


def test_batches_are_of_the_lengths_that_are_asked_for_and_within_the_budget() -> None:
    for kind, (least, most) in encoder_runtimes.LENGTHS.items():
        batches = encoder_runtimes.batches_of(words, kind, 2000, "a")
        lengths = [len(ids) for batch in batches for ids in batch]
        assert sum(lengths) >= 2000
        assert least <= min(lengths) <= max(lengths) <= most
        assert max(sum(map(len, batch)) for batch in batches) <= encoders.BATCH_TOKENS


def test_rows_of_padded_calls_come_in_the_order_of_the_batch() -> None:
    def call(inputs: Any) -> Any:
        assert (inputs.ids[inputs.mask == 0] == 1).all()
        return inputs.ids[:, :, None].astype(np.float32)

    batch = [np.arange(n, 2 * n, dtype=np.int32) for n in (3, 40, 2, 41, 3)]
    rows = encoder_runtimes.padded(call)(batch)
    assert rows[:, 0].tolist() == np.concatenate(batch).tolist()


def test_a_runtime_is_compared_with_llama_cpp_within_each_round() -> None:
    def runtime(seconds: list[float], vector: list[float]) -> Any:
        left = iter([9.0, *seconds])  # the first turn is to warm up

        def turn(batches: Any) -> Turn:
            return Turn(next(left), 2.0, np.array([vector], np.float32), 3 << 20)

        return SimpleNamespace(turn=turn)

    runtimes = {
        "llamacpp": runtime([2.0, 4.0, 2.0], [1, 0]), "onnx": runtime([1.0, 1.0, 4.0], [0.8, 0.6]),
    }  # fmt: skip
    found = encoder_runtimes.measure(runtimes, ["short"], 100, 3, words)["onnx"]["short"]
    assert (found["ratio"], found["least"], found["most"]) == (2.0, 0.5, 4.0)
    assert found["cpu_ratio"] == 1.0
    assert (found["max_difference"], found["max_cosine_distance"]) == (0.6, 0.2)
    assert found["memory_mb"] == 3
