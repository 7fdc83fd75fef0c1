"""GGUFs as directories for MLX: what is kept, and what is refused. test_mlx.py compares numbers."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from errors import ModelLoadFailed
from settings import ROOT
from tests import gguf_fixtures
from tests.engines import engine_of, generate, needs_mlx

pytestmark = [pytest.mark.real, needs_mlx]


def quantized(tiny: Path, out: Path, kind: str) -> Path:
    """The tiny model with its matrices in a type of llama.cpp's."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.pure = True
    assert llama_cpp.llama_model_quantize(str(tiny).encode(), str(out).encode(), params) == 0
    return out


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q4_1", 4), ("Q8_0", 8)])
def test_blocks_are_kept_as_they_are(
    kind: str, bits: int, tiny: Path, tiny_mlx: Path, tmp_path: Path
) -> None:
    import mlx.core as mx

    from models.convert.gguf_to_mlx import convert

    source = quantized(tiny, tmp_path / f"{kind}.gguf", kind)
    convert(source, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": bits}
    weights: dict[str, Any] = mx.load(str(tmp_path / "out/model.safetensors"))
    whole: dict[str, Any] = mx.load(str(tiny_mlx / "model.safetensors"))
    for name in ("mlp.up_proj", "self_attn.q_proj", "self_attn.v_proj"):
        weight, scales, biases = (
            weights[f"model.layers.1.{name}.{part}"] for part in ("weight", "scales", "biases")
        )
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        found = np.array(mx.dequantize(weight, scales, biases, 32, bits))
        step = np.repeat(np.abs(np.array(scales)), 32, axis=-1)
        assert (np.abs(found - whole[f"model.layers.1.{name}.weight"]) <= step * 1.01).all()
    engine = engine_of(tmp_path / "out")
    assert len(generate(engine, {1: [5, 6, 7]}, 4)[1]) == 4
    engine.close()


def test_a_vocabulary_of_sentencepiece_gives_the_same_ids(tmp_path: Path) -> None:
    from models.convert.gguf_to_mlx import convert

    source = gguf_fixtures.write_tiny_spm(tmp_path / "spm.gguf")
    convert(source, tmp_path / "out")
    theirs, ours = engine_of(source), engine_of(tmp_path / "out")
    assert (ours.tokenizer.bos, ours.n_ctx) == (theirs.tokenizer.bos, theirs.n_ctx)
    words = [
        "hello",
        " world",
        "the city",
        "river",
        "\n",
        "  ",
        "é",
        "🎉",
        "</s>",
        "<|im_end|>",
        "x",
    ]
    dice = random.Random(2)
    for number in range(300):
        text = "".join(dice.choices(words, k=dice.randint(1, 9)))
        for parse_special, continues in ((False, False), (True, False), (False, True)):
            asked = {"parse_special": parse_special, "continues": continues}
            wanted = theirs.tokenizer.tokenize(text, **asked)
            assert ours.tokenizer.tokenize(text, **asked) == wanted, (number, text, asked)
    for token in range(ours.tokenizer.n_vocab):
        assert ours.tokenizer.piece(token) == theirs.tokenizer.piece(token), token
    prompt = [1, 270, 280, 290]
    assert generate(ours, {1: prompt}, 5) == generate(theirs, {1: prompt}, 5)
    ours.close()
    theirs.close()


def test_it_is_a_command(tiny: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        command = [sys.executable, "-m", "models.convert.gguf_to_mlx", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    status, said = run("--help")
    assert (status, "Q4_0, Q4_1 and Q8_0" in said) == (0, True)
    assert run(tiny, tmp_path / "out") == (0, "")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    status, said = run(ROOT / "README.md", tmp_path / "no")
    assert status == 1
    assert said.startswith("README.md cannot be read")
    assert not (tmp_path / "no").exists()


def test_what_it_cannot_do_is_said(tmp_path: Path, tiny: Path) -> None:
    from models.convert.gguf_to_mlx import convert

    other = gguf_fixtures.write_tiny_gemma3(tmp_path / "gemma3.gguf")
    with pytest.raises(ModelLoadFailed, match=r"gemma3\.gguf is of the architecture gemma3"):
        convert(other, tmp_path / "out")
    with pytest.raises(ModelLoadFailed, match=r"absent\.gguf cannot be read"):
        convert(tmp_path / "absent.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("llama.rope.scaling.type", "yarn", "scales positions (yarn, 1)"),
        ("llama.rope.scaling.factor", 4.0, "scales positions (linear, 4)"),
        ("llama.rope.dimension_count", 8, "turns 8 of the 16 numbers of a head"),
        ("llama.expert_count", 8, "is a mixture of experts"),
    ],
)
def test_what_would_be_another_model_is_not_converted(key: str, value: Any, words: str) -> None:
    from models.convert.gguf_to_mlx import Header

    plain = {
        "general.architecture": "llama", "tokenizer.ggml.model": "llama",
        "llama.embedding_length": 64, "llama.attention.head_count": 4,
        "llama.rope.dimension_count": 16,
    }  # fmt: skip
    Header("a.gguf", plain)
    with pytest.raises(ModelLoadFailed) as caught:
        Header("a.gguf", plain | {key: value})
    assert caught.value.message.startswith(f"a.gguf {words}")


def test_every_token_that_ends_an_answer_is_written() -> None:
    from models.convert.gguf_to_mlx import Header, ends

    numbers = {"eos": 2, "eot": 3, "eom": 99}
    of = {f"tokenizer.ggml.{name}_token_id": number for name, number in numbers.items()}
    header = Header("a.gguf", of | {
        "general.architecture": "llama", "tokenizer.ggml.model": "llama",
        "llama.embedding_length": 64, "llama.attention.head_count": 4,
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "<turn>"],
    })  # fmt: skip
    assert ends(header) == [2, 3]
