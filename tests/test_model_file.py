"""What a GGUF header says, and the sentence for each way in which a file can be no model."""

import os
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat.infill import FAMILIES
from engine.model_file import ModelFile, open_header, read_model_file
from errors import ModelLoadFailed
from tests.gguf_fixtures import (
    raw_text,
    spm_vocabulary,
    truncate,
    write_minimal,
    write_raw,
    write_text,
    write_tiny_spm,
    write_unknown_architecture,
)

REAL = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT, ARRAY, U32 = 8, 9, 4  # value types


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secret-folder")


@pytest.fixture(scope="module")
def spm(folder: Path) -> Path:
    return write_tiny_spm(folder / "spm.gguf")


def fault_of(path: Path) -> str:
    """The sentence of the error that reading `path` must raise."""
    with pytest.raises(ModelLoadFailed) as caught:
        read_model_file(path)
    message = caught.value.message
    assert message.startswith(f"{path.name} ")
    assert message.endswith(".")
    assert "\n" not in message
    assert ". " not in message, "one sentence"
    assert str(path.parent) not in message
    assert path.parent.name not in message, "the folder is nobody's business"
    return message


def key_value(key: str, type_: int, value: bytes) -> bytes:
    return raw_text(key) + struct.pack("<I", type_) + value


def tensor(name: str, *shape: int, type_: int = 0, offset: int = 0) -> bytes:
    shape_bytes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return raw_text(name) + shape_bytes + struct.pack("<IQ", type_, offset)


# The facts.


def test_the_facts_of_a_small_llama(spm: Path) -> None:
    model = read_model_file(spm)
    tokens, _, _ = spm_vocabulary()
    assert model.path == spm
    assert model.size_bytes == spm.stat().st_size
    assert model.architecture == "llama"
    assert model.name == "Tiny Llama of random weights"
    assert model.n_ctx_train == 512
    assert (model.n_layer, model.n_embd, model.n_vocab) == (2, 64, len(tokens))
    assert model.kv_bytes_per_token == 2 * 2 * (16 + 16) * 2  # layers x heads x (k + v) x f16
    assert model.n_head == 4
    assert model.chat_template is not None
    assert model.chat_template.startswith("{% for message in messages %}")
    assert (model.bos_token, model.eos_token) == ("<s>", "</s>")
    assert model.add_bos
    assert model.control_tokens == ("<|im_start|>", "<|im_end|>", "<unk>", "</s>", "<s>")
    assert model.kind == "chat"


def test_what_a_file_need_not_say(tmp_path: Path) -> None:
    path = write_minimal(tmp_path / "no-name.gguf")
    model = read_model_file(path)
    assert model.name == "no-name"
    assert model.chat_template is None
    assert (model.bos_token, model.eos_token, model.add_bos) == ("", "", False)
    assert model.control_tokens == ("<|im_end|>", "<x>")
    assert model.kv_bytes_per_token == 2 * 2 * (4 + 4) * 2  # as many KV heads as heads


def test_a_file_may_have_another_template_for_tools(tmp_path: Path) -> None:
    assert read_model_file(write_minimal(tmp_path / "m.gguf")).tool_template is None
    templates = {"tokenizer.chat_template": "D", "tokenizer.chat_template.tool_use": "T"}
    model = read_model_file(write_minimal(tmp_path / "m.gguf", **templates))
    assert (model.chat_template, model.tool_template) == ("D", "T")


def test_a_file_without_a_vocabulary_gives_its_size_alone(tmp_path: Path) -> None:
    path = write_minimal(
        tmp_path / "m.gguf",
        tokenizer__ggml__tokens=None,
        tokenizer__ggml__token_type=None,
        llama__vocab_size=7,
    )
    model = read_model_file(path)
    assert (model.n_vocab, model.control_tokens, model.eos_token) == (7, (), "")


@pytest.mark.parametrize(
    ("metadata", "n_bytes"),
    [
        ({"llama.attention.head_count_kv": 1}, 2 * 1 * (4 + 4) * 2),
        ({"llama.attention.head_count_kv": [2, 0]}, 2 * (4 + 4) * 2),  # a layer without attention
        ({"llama.attention.key_length": 6, "llama.attention.value_length": 5}, 2 * 2 * 11 * 2),
        ({"llama.attention.head_count": None}, 0),  # a recurrent model
    ],
)
def test_kv_bytes_of_a_token(tmp_path: Path, metadata: dict[str, Any], n_bytes: int) -> None:
    model = read_model_file(write_minimal(tmp_path / "m.gguf", **metadata))
    assert model.kv_bytes_per_token == n_bytes


@pytest.mark.parametrize(
    ("tokenizer", "metadata", "add_bos"),
    [
        ("gpt2", {}, False),
        ("gpt2", {"bos_token_id": 0}, False),
        ("gpt2", {"bos_token_id": 0, "add_bos_token": True}, True),
        ("gpt2", {"bos_token_id": 0, "pre": "llama-bpe"}, True),
        ("gpt2", {"bos_token_id": 0, "pre": "qwen2"}, False),
        ("gpt2", {"add_bos_token": True}, False),  # there is none
        ("llama", {}, True),  # id 1 by default
        ("llama", {"add_bos_token": False}, False),
        ("llama", {"bos_token_id": 99}, True),  # outside the vocabulary: the default
    ],
)
def test_who_begins_with_bos(
    tmp_path: Path, tokenizer: str, metadata: dict[str, Any], add_bos: bool
) -> None:
    keys = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    keys["tokenizer.ggml.model"] = tokenizer
    path = write_minimal(tmp_path / "m.gguf", **keys)
    assert read_model_file(path).add_bos is add_bos


def test_control_tokens_are_those_that_a_prompt_could_smuggle_in(tmp_path: Path) -> None:
    tokens = ["<|eot_id|>", "<plain>", "<unk>", "<longer_control>", "", "[EOS]", "x[EOS]", "</s>"]
    path = write_minimal(
        tmp_path / "m.gguf",
        tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__token_type=[1, 1, 2, 3, 3, 1, 1, 4],
    )
    control = ("<longer_control>", "<|eot_id|>", "<unk>", "[EOS]", "</s>")
    assert sorted(read_model_file(path).control_tokens) == sorted(control)
    lengths = [len(token) for token in read_model_file(path).control_tokens]
    assert lengths == sorted(lengths, reverse=True)


def test_marks_of_infilling_are_control_tokens_whatever_their_type(tmp_path: Path) -> None:
    marks = {mark for family in FAMILIES for mark in family}
    path = write_minimal(
        tmp_path / "fim.gguf",
        tokenizer__ggml__tokens=[*marks, "plain"],
        tokenizer__ggml__token_type=[1] * (len(marks) + 1),
    )
    assert set(read_model_file(path).control_tokens) == marks


def test_ends_of_turn_are_control_tokens_where_no_type_is_given(tmp_path: Path) -> None:
    path = write_minimal(tmp_path / "m.gguf", tokenizer__ggml__token_type=None)
    assert read_model_file(path).control_tokens == ("<|im_end|>",)


LABELS = {"bert.classifier.output_labels": ["LABEL_0"]}


@pytest.mark.parametrize(
    ("architecture", "more", "kind"),
    [
        ("llama", {}, "chat"),
        ("qwen3", {"qwen3.pooling_type": 3}, "embedding"),
        ("qwen3", {"qwen3.pooling_type": 4}, "reranker"),
        ("bert", {}, "embedding"),
        # as bge-small-en-v1.5, whose config has one label
        ("bert", {**LABELS, "bert.pooling_type": 2}, "embedding"),
        ("bert", LABELS, "embedding"),
        ("bert", {**LABELS, "tensors": ("token_embd.weight", "cls.weight")}, "reranker"),
        ("bert", {"tensors": ("token_embd.weight", "cls.weight")}, "embedding"),
        ("bert", {"tensors": ("token_embd.weight", "cls.output.weight")}, "reranker"),
    ],
)
def test_kinds(tmp_path: Path, architecture: str, more: dict[str, Any], kind: str) -> None:
    path = write_minimal(tmp_path / "m.gguf", architecture=architecture, **more)
    model = read_model_file(path)
    assert model.kind == kind
    if architecture == "bert":
        assert model.kv_bytes_per_token == 0


def test_rope_for_long_contexts_begins_behind_the_short_one(tmp_path: Path) -> None:
    def n_ctx_short(*tensors: str, original: int | None = 64) -> int:
        key = {"phi3__rope__scaling__original_context_length": original}
        path = write_minimal(tmp_path / "m.gguf", architecture="phi3", tensors=tensors, **key)
        return read_model_file(path).n_ctx_short

    assert n_ctx_short("token_embd.weight") == 0
    assert n_ctx_short("rope_factors_long.weight", "rope_factors_short.weight") == 64
    assert n_ctx_short("rope_factors_long.weight", original=None) == 128


def test_an_unknown_architecture_passes_here(tmp_path: Path) -> None:
    """Whether it runs is llama.cpp's to say, and that changes from version to version."""
    model = read_model_file(write_unknown_architecture(tmp_path / "m.gguf"))
    assert (model.architecture, model.kind) == ("perpetuum", "chat")


def test_the_header_is_open_to_other_readers(spm: Path) -> None:
    with open_header(spm) as header:
        tokens = header.array("tokenizer.ggml.tokens")
        assert tokens is not None
        assert header.texts(tokens, [1, 2]) == ["<s>", "</s>"]
        assert header.numbers("tokenizer.ggml.token_type", 3).tolist() == [2, 3, 3]
        assert header.numbers("no.such.key", 3).tolist() == []
        assert header.text("general.architecture") == "llama"


# Split models.


def parts(folder: Path, count: int = 2) -> list[Path]:
    paths = [folder / f"m-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    for path in paths:
        write_minimal(path, split__count=count)
    return paths


def test_a_split_model_is_as_large_as_its_parts(tmp_path: Path) -> None:
    first, second = parts(tmp_path)
    size_bytes = first.stat().st_size + second.stat().st_size
    assert read_model_file(first).size_bytes == size_bytes


def test_a_part_of_a_split_model_is_missing(tmp_path: Path) -> None:
    first, second = parts(tmp_path)
    second.unlink()
    assert f"{second.name} is not beside it" in fault_of(first)


def test_a_later_part_of_a_split_model_is_not_the_model(tmp_path: Path) -> None:
    assert "give the first part" in fault_of(parts(tmp_path)[1])


# Files that are no model.


def test_a_missing_file(tmp_path: Path) -> None:
    assert "check its path" in fault_of(tmp_path / "gone.gguf")
    assert "check its path" in fault_of(tmp_path / "no-such-folder" / "gone.gguf")


def test_a_path_through_a_file(spm: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="check its path"):
        read_model_file(spm / "m.gguf")


def test_paths_that_no_system_has(tmp_path: Path) -> None:
    for name in ("a\0b.gguf", "x" * 300):
        assert "check its path" in fault_of(tmp_path / name)


def test_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "a-directory"
    path.mkdir()
    assert "is a directory" in fault_of(path)


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in fault_of(tmp_path / "pipe")


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.touch()
    assert "is empty" in fault_of(path)


def test_a_text(tmp_path: Path) -> None:
    assert "is not a GGUF file" in fault_of(write_text(tmp_path / "letter.gguf"))


def test_a_git_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "pointer.gguf"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert "git lfs pull" in fault_of(path)


@pytest.mark.parametrize("version", [0, 1, 4, 99])
def test_other_versions(tmp_path: Path, version: int) -> None:
    path = write_raw(tmp_path / "m.gguf", version=version)
    assert f"has GGUF version {version}" in fault_of(path)


def test_big_endian(tmp_path: Path) -> None:
    assert "is a big-endian GGUF" in fault_of(write_raw(tmp_path / "m.gguf", version=3 << 24))


def test_version_two_is_read(tmp_path: Path) -> None:
    path = write_minimal(tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    content[4] = 2
    path.write_bytes(content)
    assert read_model_file(path).n_layer == 2


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    whole = write_minimal(tmp_path / "whole.gguf")
    for size in range(whole.stat().st_size):
        message = fault_of(truncate(whole, tmp_path / "m.gguf", size))
        if size >= 4:
            assert "is cut short" in message


def test_where_it_is_cut_is_said(tmp_path: Path, spm: Path) -> None:
    with open_header(spm) as header:
        tokens = header.array("tokenizer.ggml.tokens")
        assert tokens is not None
    cut = tmp_path / "m.gguf"
    assert "inside its header" in fault_of(truncate(spm, cut, 20))
    assert "inside its vocabulary" in fault_of(truncate(spm, cut, tokens.start + 100))
    message = fault_of(truncate(spm, cut, -1))
    size = spm.stat().st_size
    assert f"it has {size - 1:,} bytes of {size:,}" in message


@pytest.mark.parametrize("type_", gguf.GGML_QUANT_SIZES, ids=lambda type_: type_.name)
def test_the_size_of_each_type_of_tensor_is_known(
    tmp_path: Path, type_: gguf.GGMLQuantizationType
) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    content = tensor("t", 3 * block, 2, type_=type_)
    architecture = key_value("general.architecture", TEXT, raw_text("llama"))
    padding = bytes(-(24 + len(architecture) + len(content)) % 32)
    whole = bytes(6 * block_bytes)
    path = tmp_path / "m.gguf"
    for data, said in ((whole, "is not a whole language model"), (whole[1:], "is cut short")):
        write_raw(path, architecture, content, padding, data, n_keys=1, n_tensors=1)
        assert said in fault_of(path)


def test_a_tensor_of_a_newer_type_is_left_to_llama_cpp(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "m.gguf", tensor("t", 1 << 40, type_=200), n_tensors=1)
    assert "does not name its architecture" in fault_of(path)  # that is the first fault


HUGE = struct.pack("<Q", 2**63 + 5)
HOSTILE = {
    "key as long as the sea": [HUGE],
    "text as long as the sea": [key_value("a", TEXT, HUGE)],
    "array of 2**63 numbers": [key_value("a", ARRAY, struct.pack("<I", U32) + HUGE)],
    "array of 2**63 texts": [key_value("a", ARRAY, struct.pack("<I", TEXT) + HUGE)],
    "text in an array that wraps": [
        key_value("a", ARRAY, struct.pack("<IQ", TEXT, 2) + struct.pack("<Q", 2**64 - 8))
    ],
    "array within an array": [key_value("a", ARRAY, struct.pack("<IQ", ARRAY, 1))],
    "value of no known type": [key_value("a", 77, b"")],
    "array of no known type": [key_value("a", ARRAY, struct.pack("<IQ", 77, 1))],
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_lengths_are_not_believed(tmp_path: Path, content: list[bytes]) -> None:
    fault_of(write_raw(tmp_path / "m.gguf", *content, bytes(64), n_keys=1))


@pytest.mark.parametrize("counts", [{"n_keys": 2**63}, {"n_tensors": 2**63}, {"n_keys": 1 << 16}])
def test_counts_are_not_believed(tmp_path: Path, counts: dict[str, int]) -> None:
    fault_of(write_raw(tmp_path / "m.gguf", bytes(64), **counts))


def test_a_tensor_beyond_the_file(tmp_path: Path) -> None:
    architecture = key_value("general.architecture", TEXT, raw_text("llama"))
    for content in (tensor("t", 2**63, 2**63), tensor("t", 4, offset=2**63)):
        path = write_raw(tmp_path / "m.gguf", architecture, content, n_keys=1, n_tensors=1)
        assert "is cut short" in fault_of(path)
    path = write_raw(tmp_path / "m.gguf", tensor("t", *[1] * 5), n_tensors=1)
    assert "5 dimensions" in fault_of(path)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"general.name": 3}, "general.name has a value of the wrong type"),
        ({"llama.context_length": None}, "is not a whole language model"),
        ({"llama.context_length": "long"}, "wrong type"),
        ({"llama.context_length": True}, "wrong type"),
        ({"llama.context_length": 2**32 - 1}, "out of range"),
        ({"llama.block_count": 0}, "is not a whole language model"),
        ({"llama.block_count": 1 << 20}, "llama.block_count is out of range"),
        ({"llama.embedding_length": None}, "is not a whole language model"),
        ({"llama.attention.head_count_kv": [1]}, "does not fit its 2 layers"),
        ({"llama.attention.head_count_kv": [1, -1]}, "does not fit its 2 layers"),
        ({"llama.attention.head_count_kv": ["a", "b"]}, "wrong type"),
        ({"llama.attention.head_count_kv": [0.5, 0.5]}, "wrong type"),
        ({"tokenizer.ggml.tokens": 3}, "wrong type"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "vocabulary is not text"),
        ({"tokenizer.ggml.token_type": ["a"]}, "wrong type"),
        ({"tokenizer.ggml.add_bos_token": 1}, "wrong type"),
        ({"tokenizer.chat_template": ["a"]}, "wrong type"),
    ],
)
def test_values_that_make_no_sense(tmp_path: Path, metadata: dict[str, Any], said: str) -> None:
    assert said in fault_of(write_minimal(tmp_path / "m.gguf", **metadata))


@pytest.mark.parametrize(
    ("type_", "value", "said"),
    [
        (U32, struct.pack("<I", 3), "general.architecture has a value of the wrong type"),
        (TEXT, raw_text(""), "does not name its architecture"),
        (TEXT, raw_text("../x y"), "does not name its architecture"),
    ],
)
def test_an_architecture_that_makes_no_sense(
    tmp_path: Path, type_: int, value: bytes, said: str
) -> None:
    content = key_value("general.architecture", type_, value)
    assert said in fault_of(write_raw(tmp_path / "m.gguf", content, n_keys=1))


def test_types_for_fewer_tokens_than_there_are(tmp_path: Path) -> None:
    path = write_minimal(tmp_path / "m.gguf", tokenizer__ggml__token_type=[3])
    assert read_model_file(path).control_tokens == ("<|im_end|>", "a")


def test_a_name_that_is_not_text_is_still_named(tmp_path: Path) -> None:
    path = Path(f"{tmp_path}/caf\udce9.gguf")
    with pytest.raises(ModelLoadFailed) as caught:
        read_model_file(path)
    assert caught.value.message.encode().startswith(b"caf?.gguf ")


# Fuzz.


def read_quickly(path: Path) -> ModelFile | None:
    """The model, or None where the file is refused; nothing else may happen, and soon."""
    started = time.thread_time()
    try:
        return read_model_file(path)
    except ModelLoadFailed:
        return None
    finally:
        assert time.thread_time() - started < 1


@pytest.fixture(scope="module")
def header_bytes(folder: Path) -> bytes:
    path = write_minimal(folder / "seed.gguf", llama__attention__head_count_kv=[1, 2])
    return path.read_bytes()


places = st.integers(0, 10_000)
lengths = st.sampled_from([0, 1, 2**16 + 1, 2**22, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1])


@settings(max_examples=400, derandomize=True, database=None)
@given(
    changes=st.lists(st.tuples(places, st.binary(min_size=1, max_size=4)), max_size=4),
    numbers=st.lists(st.tuples(places, lengths), max_size=2),
    cut=st.none() | places,
)
def test_mutated_bytes_are_read_or_refused(
    folder: Path,
    header_bytes: bytes,
    changes: list[tuple[int, bytes]],
    numbers: list[tuple[int, int]],
    cut: int | None,
) -> None:
    content = bytearray(header_bytes)
    patches = changes + [(at, struct.pack("<Q", number)) for at, number in numbers]
    for at, patch in patches:
        start = at % len(content)
        content[start : start + len(patch)] = patch
    path = folder / "mutant.gguf"
    path.write_bytes(content if cut is None else content[: cut % len(content)])
    read_quickly(path)


@settings(max_examples=200, derandomize=True, database=None)
@given(content=st.binary(max_size=200))
def test_random_bytes_are_refused(folder: Path, content: bytes) -> None:
    path = folder / "noise.gguf"
    for start in (b"", b"GGUF\3\0\0\0", b"GGUF\3\0\0\0" + struct.pack("<QQ", 1, 2)):
        path.write_bytes(start + content)
        assert read_quickly(path) is None


# A real model.


@pytest.mark.real
@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL.name} is not in models/")
def test_a_real_model_is_read_at_once() -> None:
    started = time.thread_time()
    model = read_model_file(REAL)
    assert time.thread_time() - started < 0.5
    assert (model.architecture, model.kind) == ("llama", "chat")
    assert (model.n_ctx_train, model.n_layer, model.n_embd) == (8192, 30, 576)
    assert (model.n_vocab, model.kv_bytes_per_token) == (49152, 23040)
    assert (model.bos_token, model.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert model.add_bos is False
    assert model.chat_template is not None
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= set(model.control_tokens)
    assert model.size_bytes == REAL.stat().st_size


@pytest.mark.parametrize(
    ("key", "value", "is_plain"),
    [
        ("llama.rope.freq_base", 10000.0, True),
        ("llama.attention.sliding_window", 512, False),
        ("llama.ssm.conv_kernel", 4, False),
        ("llama.shortconv.l_cache", 3, False),
        ("llama.rope.scaling.original_context_length", 4096, False),
    ],
)
def test_cells_are_plain_without_windows_states_and_two_sets_of_factors(
    tmp_path: Path, key: str, value: object, is_plain: bool
) -> None:
    assert read_model_file(write_minimal(tmp_path / "m.gguf", **{key: value})).has_plain_cells == (
        is_plain
    )


def test_factors_of_long_contexts_in_the_tensors_are_not_plain(tmp_path: Path) -> None:
    path = write_minimal(tmp_path / "m.gguf", tensors=("rope_factors_long.weight",))
    assert not read_model_file(path).has_plain_cells
