"""A GGUF as a directory: what comes out is what the same model is in Hugging Face's form."""

import json
from pathlib import Path

import numpy as np
import pytest

from engine.model_folder import pooling_in
from engine.tensors import read_tensors
from errors import ModelLoadFailed
from models.convert.gguf_to_folder import convert
from tests import encoder_fixtures as tiny


def test_a_directory_out_of_a_gguf_is_the_models_own(tmp_path: Path) -> None:
    own, made = tiny.write_hf_embedder(tmp_path / "own"), tmp_path / "made"
    convert(tiny.write_embedder(tmp_path / "tiny.gguf"), made)
    ours, theirs = (json.loads((at / "tokenizer.json").read_text()) for at in (made, own))
    assert ours.pop("model")["vocab"] == [
        [piece, np.float32(score)] for piece, score in theirs.pop("model")["vocab"]
    ]
    assert ours == theirs
    config, wanted = (json.loads((at / "config.json").read_text()) for at in (made, own))
    assert config.pop("layer_norm_eps") == pytest.approx(wanted.pop("layer_norm_eps"))
    assert config.items() <= wanted.items()
    assert pooling_in(made) == "cls"
    tensors, expected = (read_tensors(at / "model.safetensors") for at in (made, own))
    assert tensors.keys() == expected.keys()
    for name, values in tensors.items():
        skipped = 2 if "position" in name else 0  # rows that are never used
        assert np.array_equal(values[skipped:], expected[name][skipped:]), name


def test_what_is_no_embedder_of_the_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match=r"rr\.gguf has a tensor cls\."):
        convert(tiny.write_reranker(tmp_path / "rr.gguf"), tmp_path / "made")
    (tmp_path / "no.gguf").write_bytes(b"nothing at all, and no GGUF")
    with pytest.raises(ModelLoadFailed, match=r"no\.gguf cannot be read"):
        convert(tmp_path / "no.gguf", tmp_path / "made")
    assert not (tmp_path / "made").exists()
