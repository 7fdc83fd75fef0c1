"""The benchmark of embeddings: what it compares, and that it ends by itself."""

from pathlib import Path

import pytest

from bench import encoders
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
    assert len(lines) == 4
    assert all(" tokens/s)" in line or " ms)" in line for line in lines)
