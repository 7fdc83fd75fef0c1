"""The converter for BGE-M3 and its rerankers gives models that compute what the originals do."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.heads import find_heads
from engine.model_file import open_header, read_model_file
from errors import ModelLoadFailed
from models.convert.bge_m3 import convert
from models.convert.hf_folder import write_safetensors
from settings import ROOT
from tests import encoder_fixtures as tiny
from tests.encoder_fixtures import PAIRS, TEXTS, hf_tensors
from tests.plain_encoder import FLASH_OFF, Encoder
from tests.test_encoder_fixtures import TOLERANCES
from tests.torch_files import write_pt

real = pytest.mark.real


def protobuf(number: int, value: bytes | int | float) -> bytes:
    if isinstance(value, int):
        return bytes([number << 3, value])
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    size, n_bytes = b"", len(value)
    while n_bytes > 127:
        size, n_bytes = size + bytes([n_bytes & 127 | 128]), n_bytes >> 7
    return bytes([number << 3 | 2]) + size + bytes([n_bytes]) + value


def write_sentencepiece(path: Path) -> None:
    """The vocabulary as SentencePiece has it: with three special tokens, not XLM-R's."""
    vocab = tiny.unigram()
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += zip(vocab.pieces[4:-1], vocab.scores[4:-1], strict=True)
    content = b"".join(
        protobuf(1, protobuf(1, piece.encode()) + protobuf(2, score) + protobuf(3, 1))
        for piece, score in pieces
    )
    content += protobuf(2, protobuf(3, 1)) + protobuf(3, protobuf(2, vocab.charsmap))
    path.write_bytes(content)


@real
@pytest.mark.parametrize("file_type", ["F32", "F16", "Q8_0"])
def test_an_embedder_gives_all_three_outputs_from_one_file(
    file_type: tiny.FileType, load_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    model = tiny.tiny_embedder()
    out = tmp_path / "m3.gguf"
    convert(tiny.write_hf_embedder(tmp_path / "bge-m3"), out, file_type)

    file = read_model_file(out)
    assert (file.kind, file.name, file.n_ctx_train) == ("embedding", "bge-m3", 512)
    heads, missing = find_heads(out, model.n_embd, None, None)
    assert heads is not None
    assert missing == ()
    assert (heads.sparse_weight == model.heads["sparse_linear"].weight[0]).all()
    assert heads.sparse_bias == model.heads["sparse_linear"].bias[0]
    assert (heads.colbert_weight == model.heads["colbert_linear"].weight).all()
    assert (heads.colbert_bias == model.heads["colbert_linear"].bias).all()

    encoder = load_encoder(out, pooling=0)
    original = load_encoder(tiny.write_embedder(tmp_path / "original.gguf"), pooling=0)
    for text in TEXTS:
        ids = encoder.ids(text)
        assert ids == original.ids(text)
        off = abs(encoder.run(ids) - model.hidden(ids)).max()
        assert off < TOLERANCES[file_type, FLASH_OFF][0]


@real
@pytest.mark.parametrize("file_type", ["F32", "F16", "Q8_0"])
def test_a_reranker_gives_its_logits(
    file_type: tiny.FileType, load_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    out = tmp_path / "reranker.gguf"
    convert(tiny.write_hf_reranker(tmp_path / "bge-reranker"), out, file_type)
    assert read_model_file(out).kind == "reranker"
    encoder = load_encoder(out)
    for pair in PAIRS[::5]:
        ids = encoder.pair(*pair)
        expected = tiny.tiny_reranker().logit(ids)
        assert encoder.run(ids)[0] == pytest.approx(expected, abs=TOLERANCES[file_type, 0][-1])


def test_the_tokenizer_says_what_others_forget(tmp_path: Path) -> None:
    convert(tiny.write_hf_embedder(tmp_path / "hf"), tmp_path / "m3.gguf")
    tiny.write_embedder(tmp_path / "right.gguf")
    with open_header(tmp_path / "m3.gguf") as found, open_header(tmp_path / "right.gguf") as right:
        for key, value in right.metadata.items():
            if key.startswith("tokenizer.") and isinstance(value, str | int | float):
                assert found.metadata[key] == value, key
        assert found.number("bert.pooling_type", 0) == right.number("bert.pooling_type", 1)
        tokens = found.array("tokenizer.ggml.tokens")
        assert tokens
        assert tuple(found.texts(tokens, range(tokens.count))) == tiny.unigram().pieces
        types = [header.numbers("tokenizer.ggml.token_type", 999) for header in (found, right)]
        assert (types[0] == types[1]).all()


@real
def test_older_directories_are_read_too(
    load_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    """pytorch_model.bin and sentencepiece.bpe.model, as in the first uploads."""
    folder = tiny.write_hf_embedder(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    position_ids = {"embeddings.position_ids": np.arange(514, dtype=np.float32)[None]}
    weights = position_ids | hf_tensors(tiny.tiny_embedder())
    write_pt(folder / "pytorch_model.bin", weights)
    write_sentencepiece(folder / "sentencepiece.bpe.model")
    convert(folder, tmp_path / "m3.gguf", "F32")
    encoder = load_encoder(tmp_path / "m3.gguf", pooling=0)
    original = load_encoder(tiny.write_embedder(tmp_path / "original.gguf"), pooling=0)
    for text in TEXTS:
        ids = encoder.ids(text)
        assert ids == original.ids(text)
        assert (encoder.run(ids) == original.run(ids)).all()


def test_weights_in_several_files_are_put_together(tmp_path: Path) -> None:
    folder = tiny.write_hf_embedder(tmp_path / "hf")
    convert(folder, tmp_path / "one.gguf", "F32")
    (folder / "model.safetensors").unlink()
    names = {}
    tensors = list(hf_tensors(tiny.tiny_embedder()).items())
    for part, some in enumerate((tensors[:9], tensors[9:]), 1):
        file = f"model-0000{part}-of-00002.safetensors"
        write_safetensors(folder / file, dict(some))
        names |= {name: file for name, _ in some}
    index = json.dumps({"weight_map": names})
    (folder / "model.safetensors.index.json").write_text(index)
    convert(folder, tmp_path / "two.gguf", "F32")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_pooling_is_what_the_directory_or_the_caller_says(tmp_path: Path) -> None:
    folder, out = tiny.write_hf_embedder(tmp_path / "hf"), tmp_path / "e.gguf"
    for name in ("sparse_linear.pt", "colbert_linear.pt"):
        (folder / name).unlink()
    with pytest.raises(ModelLoadFailed, match="give --pooling"):
        convert(folder, out)
    assert not out.exists()

    def pooling(**options: str) -> int:
        convert(folder, out, **options)
        with open_header(out) as header:
            return header.number("bert.pooling_type", 99)

    assert pooling(pooling="mean") == 1
    assert pooling(pooling="cls") == 2
    (folder / "1_Pooling").mkdir()
    old: dict[str, object] = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    for note, wanted in ((old, 1), ({"pooling_mode": "mean"}, 1), ({"pooling_mode": "cls"}, 2)):
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(note))
        assert pooling() == wanted
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "max"}))
    with pytest.raises(ModelLoadFailed, match=r"\(max\).*--pooling"):
        convert(folder, out)
    assert pooling(pooling="last") == 3


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", '{"model_type": "bert"}', "hf is a bert, and only xlm-roberta"),
        ("config.json", "{", "config.json is damaged"),
        ("config.json", None, "config.json cannot be read: No such file"),
        ("model.safetensors", None, "hf has no model.safetensors and no pytorch_model.bin"),
        ("model.safetensors", "?", "model.safetensors is damaged"),
        ("tokenizer.json", None, "hf has no tokenizer.json and no sentencepiece.bpe.model"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}', "is not the tokenizer of an XLM-R"),
        ("colbert_linear.pt", None, "hf has no colbert_linear.pt; download it too"),
        ("sparse_linear.pt", "?", "sparse_linear.pt "),
    ],
)
def test_what_is_missing_or_wrong_is_named_and_nothing_is_written(
    file: str, content: str | None, reason: str, tmp_path: Path
) -> None:
    folder = tiny.write_hf_embedder(tmp_path / "hf")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(ModelLoadFailed, match=reason):
        convert(folder, tmp_path / "m3.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_layer_of_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = tiny.write_hf_embedder(tmp_path / "hf")
    tensors = hf_tensors(tiny.tiny_embedder())
    tensors["encoder.layer.0.adapter.weight"] = np.zeros((2, 2), np.float32)
    write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(ModelLoadFailed, match=r"there is encoder\.layer\.0\.adapter\.weight"):
        convert(folder, tmp_path / "m3.gguf")


def test_the_command_line_says_what_went_wrong(tmp_path: Path) -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "models.convert.bge_m3", *args]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert "--pooling" in run("--help").stdout
    failed = run(str(tmp_path), str(tmp_path / "out.gguf"))
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == "config.json cannot be read: No such file or directory.\n"
    tiny.write_hf_reranker(tmp_path / "hf")
    assert run(str(tmp_path / "hf"), str(tmp_path / "out.gguf"), "--type", "Q8_0").returncode == 0
    assert read_model_file(tmp_path / "out.gguf").kind == "reranker"
