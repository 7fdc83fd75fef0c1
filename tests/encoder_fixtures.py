"""Tiny encoders as files, and what they must answer, computed in float64.

Three are BERTs of random weights, always the same: an embedder like BGE-M3 and a cross-encoder like
bge-reranker-v2-m3 (both XLM-R, with a unigram vocabulary and its normalisation), and a BERT with
WordPiece and mean pooling. The fourth is a decoder that embeds with its last token, like
Qwen3-Embedding. Of the last two there are also rerankers, like ms-marco-MiniLM and Qwen3-Reranker.
All BERTs are also written as Hugging Face directories.
"""

import base64
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from numpy.typing import NDArray

from engine.model_file import open_header
from models.convert.hf_folder import around, write_json, write_safetensors
from tests.gguf_fixtures import spm_vocabulary
from tests.torch_files import write_pt

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Gelu = Literal["llama.cpp", "tanh", "erf"]  # erf is torch's
FileType = Literal["F32", "F16", "Q8_0"]

TEXTS = (
    "hello world",
    "What is BGE M3?",
    "the quick brown fox jumps over the lazy dog",
    "BGE M3 is an embedding model with dense, sparse and multi vector search",
    "Paris is the capital of France and Berlin of Germany",
    "machine learning in python: def return function(code)",
    "rain and sun, weather of the world",
    "the the the the",
    "привет мир",
    "Москва столица России, наука и техника",
    "bonjour le monde, où est le café?",
    "cafe\u0301 re\u0301sume\u0301 naïve élève",  # decomposed
    "你好，世界",
    "北京是中国的首都",
    "東京は日本の首都",
    "ｆｕｌｌ　ｗｉｄｔｈ！",
    "  two   spaces\tand\nnew lines  ",
    "unknown: ஃ ꙮ and known 🙂 🌍",
    "½ ﬁne™",
    ".",
    " ".join(["hello world and what of the weather in Paris?"] * 12),
)
QUERIES = ("what is the capital of France", "машина мир", "python code", "你好世界")
PAIRS = tuple((query, text) for query in QUERIES for text in TEXTS)


# What they know


@dataclass(frozen=True)
class Unigram:
    """A SentencePiece unigram vocabulary with XLM-R's special tokens."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    charsmap: bytes  # SentencePiece's normalisation: a trie, then the replacements
    bos, pad, eos, unk = 0, 1, 2, 3

    @property
    def mask(self) -> int:
        return len(self.pieces) - 1


@cache
def unigram() -> Unigram:
    words = (
        "the of and to in is a for on with an hello world quick brown fox jumps over lazy dog what "
        "BGE M3 embedding model vector search query document capital France Paris Berlin Germany "
        "machine learning sparse dense multi token weather rain sun music code python function "
        "return def line one two three new "
        "привет мир и наука техника Москва столица России быстрая машина "
        "bonjour le monde café résumé naïve élève où est"
    ).split()
    parts = "ing ed er ly s tion ers ов ая 好 世界 首都 中国 机器学习".split()
    chars = [chr(c) for c in (*range(33, 127), *range(0x410, 0x450))]
    chars += "éèàùçôïüößñ 你好世界北京中国首都机器学习東京日本的是は ，。¿€™⁄ 🙂🌍😀".replace(
        " ", ""
    )
    scored = {"▁": -3.0}
    for first, step, group in (
        (-6.0, 0.01, [f"▁{word}" for word in words]),
        (-7.0, 0.01, parts),
        (-9.0, 0.005, chars),
    ):
        for i, piece in enumerate(group):
            scored.setdefault(piece, float(np.float32(first - step * i)))
    pieces = ("<s>", "<pad>", "</s>", "<unk>", *scored, "<mask>")
    return Unigram(pieces, (0.0,) * 4 + tuple(scored.values()) + (0.0,), charsmap(_normal_forms()))


def _normal_forms() -> dict[str, str]:
    """A part of NFKC, as XLM-R has it."""
    forms = {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}  # full width
    forms |= dict.fromkeys("\n\t\r\u00a0\u3000", " ")
    return forms | {"e\u0301": "é", "ﬁ": "fi", "½": "1⁄2", "™": "TM"}


def charsmap(forms: Mapping[str, str]) -> bytes:
    """`forms` as SentencePiece stores it: a double array with one block of 256 units a node.

    A unit is what darts-clone reads: the label in the low byte, bit 8 where a form ends here, the
    offset to the node's block from bit 10 on; in bit 9, that the offset counts in blocks.
    """
    trie: dict[Any, Any] = {}
    replacements, start_of = b"", {}
    for text, form in sorted(forms.items()):
        if form not in start_of:
            start_of[form] = len(replacements)
            replacements += form.encode() + b"\0"
        node = trie
        for byte in text.encode():
            node = node.setdefault(byte, {})
        node[None] = start_of[form]

    units = [0] * 256

    def place(node: dict[Any, Any]) -> int:
        """Gives the node a block, and returns where it begins."""
        block = len(units)
        units.extend([0] * 256)
        for byte, child in node.items():
            if byte is None:
                units[block] = 1 << 31 | child
                continue
            at = block ^ byte
            offset = at ^ place(child)
            units[at] = byte | (None in child) << 8
            units[at] |= offset << 10 if offset < 1 << 21 else offset >> 8 << 10 | 1 << 9
        return block

    units[0] = place(trie) << 10
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + replacements


@dataclass(frozen=True)
class Head:
    weight: Floats  # [n_out, n_embd]
    bias: Floats  # [n_out]

    def tensors(self) -> dict[str, Floats]:
        return {"weight": self.weight, "bias": self.bias}


@dataclass(frozen=True)
class Bert:
    """Weights by llama.cpp's names, the shape they need, and what comes out of them."""

    tensors: Mapping[str, Floats]
    n_head: int
    n_ctx: int
    eps: float = 1e-5
    heads: Mapping[str, Head] = field(default_factory=dict)  # sparse_linear, colbert_linear

    @property
    def n_embd(self) -> int:
        return self.tensors["token_embd.weight"].shape[1]

    @property
    def n_layer(self) -> int:
        return sum(name.endswith("ffn_up.weight") for name in self.tensors)

    def hidden(
        self, ids: Sequence[int], gelu: Gelu = "llama.cpp", types: Sequence[int] | None = None
    ) -> Doubles:
        """Rows of the last layer for one text, special tokens included: [n_tokens, n_embd]."""
        n = len(ids)
        x = self.tensors["token_embd.weight"][list(ids)].astype(np.float64)
        x = x + self._of("position_embd.weight")[:n]
        if "token_types.weight" in self.tensors:
            x = x + self._of("token_types.weight")[list(types or [0] * n)]
        x = self._norm(x, "token_embd_norm")
        for i in range(self.n_layer):
            layer = f"blk.{i}."
            q, k, v = (
                self._linear(x, f"{layer}attn_{part}").reshape(n, self.n_head, -1).swapaxes(0, 1)
                for part in "qkv"
            )
            scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
            mixed = (softmax(scores) @ v).swapaxes(0, 1).reshape(n, -1)
            x = self._norm(
                x + self._linear(mixed, f"{layer}attn_output"), f"{layer}attn_output_norm"
            )
            inner = _GELU[gelu](self._linear(x, f"{layer}ffn_up"))
            x = self._norm(x + self._linear(inner, f"{layer}ffn_down"), f"{layer}layer_output_norm")
        return x

    def dense(self, hidden: Doubles) -> Doubles:
        return unit(hidden[0])

    def sparse(self, hidden: Doubles, ids: Sequence[int]) -> dict[int, float]:
        """The largest weight of each token id, without special tokens and without zeros."""
        head = self.heads["sparse_linear"]
        weights: dict[int, float] = {}
        for token, weight in zip(ids, (hidden @ head.weight.T + head.bias)[:, 0], strict=True):
            if token > 3 and weight > weights.get(token, 0):
                weights[token] = float(weight)
        return weights

    def colbert(self, hidden: Doubles) -> Doubles:
        """A row of length 1 for every token but `<s>`."""
        head = self.heads["colbert_linear"]
        return unit(hidden[1:] @ head.weight.T + head.bias)

    def logit(
        self, ids: Sequence[int], gelu: Gelu = "llama.cpp", types: Sequence[int] | None = None
    ) -> float:
        """What the classifier says about the ids of a pair."""
        first = np.tanh(self._linear(self.hidden(ids, gelu, types)[:1], "cls"))
        return float(self._linear(first, "cls.output")[0, 0])

    def taught(self, pairs: Sequence[Sequence[int]], logits: Sequence[float]) -> "Bert":
        """The same with a classifier that says this about the ids of these pairs."""
        rows = np.stack([self.hidden(ids)[0] for ids in pairs])
        wanted = np.array(logits) - self._of("cls.output.bias")
        head = np.linalg.lstsq(np.tanh(self._linear(rows, "cls")), wanted, rcond=None)[0]
        tensors = {**self.tensors, "cls.output.weight": head[None].astype(np.float32)}
        return replace(self, tensors=tensors)

    def _of(self, name: str) -> Doubles:
        return self.tensors[name].astype(np.float64)

    def _linear(self, x: Doubles, name: str) -> Doubles:
        return x @ self._of(f"{name}.weight").T + self._of(f"{name}.bias")

    def _norm(self, x: Doubles, name: str) -> Doubles:
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt(centred.var(-1, keepdims=True) + self.eps)
        return centred / scale * self._of(f"{name}.weight") + self._of(f"{name}.bias")


@dataclass(frozen=True)
class Qwen3:
    """The same for the decoder: 4 heads of queries to 2 of keys, no biases."""

    tensors: Mapping[str, Floats]

    def hidden(self, ids: Sequence[int]) -> Doubles:
        n = len(ids)
        x = self._of("token_embd")[list(ids)]
        causal = np.triu(np.full((n, n), -np.inf), 1)
        for i in range(_N_LAYER):
            layer = f"blk.{i}."
            normed = self._norm(x, f"{layer}attn_norm")
            q, k, v = (
                (normed @ self._of(f"{layer}attn_{part}").T).reshape(n, n_head, -1).swapaxes(0, 1)
                for part, n_head in (("q", _N_HEAD), ("k", 2), ("v", 2))
            )
            q = _rotated(self._norm(q, f"{layer}attn_q_norm"))
            k = _rotated(self._norm(k, f"{layer}attn_k_norm"))
            k, v = (rows.repeat(_N_HEAD // 2, axis=0) for rows in (k, v))
            scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]) + causal
            mixed = (softmax(scores) @ v).swapaxes(0, 1).reshape(n, -1)
            x = x + mixed @ self._of(f"{layer}attn_output").T
            normed = self._norm(x, f"{layer}ffn_norm")
            gate, up = (normed @ self._of(f"{layer}ffn_{part}").T for part in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self._of(f"{layer}ffn_down").T
        return self._norm(x, "output_norm")

    def yes(self, ids: Sequence[int]) -> float:
        """The judge's probability of yes, against no."""
        return float(softmax(self._of("cls.output") @ self.hidden(ids)[-1])[0])

    def _of(self, name: str) -> Doubles:
        return self.tensors[f"{name}.weight"].astype(np.float64)

    def _norm(self, x: Doubles, name: str) -> Doubles:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * self._of(name)


def _rotated(rows: Doubles) -> Doubles:
    """Rotary positions, first half against second half: [n_head, n_tokens, n_embd_head]."""
    half = rows.shape[-1] // 2
    angles = np.outer(np.arange(rows.shape[1]), 10000.0 ** (-np.arange(half) / half))
    first, second = rows[..., :half], rows[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def softmax(scores: Doubles) -> Doubles:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def unit(rows: Doubles) -> Doubles:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def max_sim(query: Doubles, document: Doubles) -> float:
    return float((query @ document.T).max(axis=1).mean())


def lexical(query: Mapping[int, float], document: Mapping[int, float]) -> float:
    return sum(weight * document.get(token, 0) for token, weight in query.items())


def _tanh_gelu(x: Doubles) -> Doubles:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _llama_gelu(x: Doubles) -> Doubles:
    """The tanh one through a table from halves to halves (ggml_vec_gelu_f32)."""
    table = _tanh_gelu(x.astype(np.float16).astype(np.float64)).astype(np.float16)
    return np.where(x <= -10, 0, np.where(x >= 10, x, table))


_erf = np.vectorize(math.erf)
_GELU: dict[Gelu, Callable[[Doubles], Doubles]] = {
    "llama.cpp": _llama_gelu,
    "tanh": _tanh_gelu,
    "erf": lambda x: x / 2 * (1 + _erf(x / np.sqrt(2))),
}


# The encoders themselves

_N_EMBD, _N_LAYER, _N_HEAD, _N_FF, _N_CTX = 64, 2, 4, 128, 512


@cache
def tiny_embedder() -> Bert:
    """Like BGE-M3, with its two heads."""
    random = _Random(11)
    tensors = random.bert(len(unigram().pieces))
    return Bert(tensors, _N_HEAD, _N_CTX, heads=random.heads(_N_EMBD))


def made_heads(n_embd: int) -> dict[str, Head]:
    """Heads for a real model that has none, always the same."""
    return _Random(15).heads(n_embd)


@cache
def tiny_reranker() -> Bert:
    """Like bge-reranker-v2-m3."""
    random = _Random(12)
    tensors = random.bert(len(unigram().pieces)) | random.classifier()
    return Bert(tensors, _N_HEAD, _N_CTX)


@cache
def tiny_bert() -> Bert:
    """Like all-MiniLM: WordPiece, mean pooling."""
    tensors = _Random(13).bert(len(wordpieces()))
    return Bert(tensors, _N_HEAD, _N_CTX, eps=1e-12)


@cache
def tiny_bert_reranker() -> Bert:
    """Like ms-marco-MiniLM: the same with a classifier."""
    random = _Random(16)
    tensors = random.bert(len(wordpieces())) | random.classifier()
    return Bert(tensors, _N_HEAD, _N_CTX, eps=1e-12)


@cache
def tiny_typed_reranker() -> Bert:
    """Like ms-marco-MiniLM also in that query and document have types of their own."""
    model = tiny_bert_reranker()
    types = _Random(18).normal(2, _N_EMBD, std=0.5)
    return replace(model, tensors={**model.tensors, "token_types.weight": types})


@cache
def tiny_decoder() -> "Qwen3":
    """Like Qwen3-Embedding: causal, and the last token's row is the text's."""
    random, n_vocab = _Random(14), len(spm_vocabulary()[0])
    n_kv = _N_EMBD // _N_HEAD * 2
    tensors = {"token_embd.weight": random.normal(n_vocab, _N_EMBD, std=1)}
    tensors["output_norm.weight"] = 1 + random.normal(_N_EMBD, std=0.05)
    for i in range(_N_LAYER):
        layer = f"blk.{i}."
        for name, n_in in (("attn_norm", 64), ("ffn_norm", 64), ("attn_q_norm", 16)):
            tensors[f"{layer}{name}.weight"] = 1 + random.normal(n_in, std=0.05)
        tensors[f"{layer}attn_k_norm.weight"] = 1 + random.normal(16, std=0.05)
        for name, n_out, n_in in (
            ("attn_q", _N_EMBD, _N_EMBD),
            ("attn_k", n_kv, _N_EMBD),
            ("attn_v", n_kv, _N_EMBD),
            ("attn_output", _N_EMBD, _N_EMBD),
            ("ffn_gate", _N_FF, _N_EMBD),
            ("ffn_up", _N_FF, _N_EMBD),
            ("ffn_down", _N_EMBD, _N_FF),
        ):
            tensors[f"{layer}{name}.weight"] = random.matrix(n_out, n_in, 1.5)
    return Qwen3(tensors)


@cache
def tiny_judge() -> "Qwen3":
    """Like Qwen3-Reranker: the decoder with the rows of its vocabulary for yes and no."""
    rows = _Random(17).matrix(2, _N_EMBD, 2)
    return Qwen3({**tiny_decoder().tensors, "cls.output.weight": rows})


class _Random:
    """Weights scaled so that attention is peaked and every layer changes its input."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.RandomState(seed)  # its stream never changes, by promise

    def normal(self, *shape: int, std: float) -> Floats:
        return (self._random.standard_normal(shape) * std).astype(np.float32)

    def matrix(self, n_out: int, n_in: int, gain: float = 1) -> Floats:
        return self.normal(n_out, n_in, std=gain * n_in**-0.5)

    def bias(self, n: int) -> Floats:
        return self.normal(n, std=0.02)

    def heads(self, n_embd: int) -> dict[str, Head]:
        return {
            "sparse_linear": Head(self.matrix(1, n_embd, 0.25), np.array([0.05], np.float32)),
            "colbert_linear": Head(self.matrix(n_embd, n_embd), self.bias(n_embd)),
        }

    def classifier(self) -> dict[str, Floats]:
        tensors = {}
        for name, n_out in (("cls", _N_EMBD), ("cls.output", 1)):
            tensors[f"{name}.weight"] = self.matrix(n_out, _N_EMBD, 3)
            tensors[f"{name}.bias"] = self.bias(n_out)
        return tensors

    def bert(self, n_vocab: int) -> dict[str, Floats]:
        tensors = {
            "token_embd.weight": self.normal(n_vocab, _N_EMBD, std=0.6),
            "position_embd.weight": self.normal(_N_CTX, _N_EMBD, std=0.05),
            "token_types.weight": self.normal(1, _N_EMBD, std=0.05),
        }

        def norm(name: str) -> None:
            tensors[f"{name}.weight"] = 1 + self.normal(_N_EMBD, std=0.05)
            tensors[f"{name}.bias"] = self.bias(_N_EMBD)

        def linear(name: str, n_out: int, n_in: int, gain: float = 1) -> None:
            tensors[f"{name}.weight"] = self.matrix(n_out, n_in, gain)
            tensors[f"{name}.bias"] = self.bias(n_out)

        norm("token_embd_norm")
        for i in range(_N_LAYER):
            for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
                linear(f"blk.{i}.{part}", _N_EMBD, _N_EMBD)
            norm(f"blk.{i}.attn_output_norm")
            linear(f"blk.{i}.ffn_up", _N_FF, _N_EMBD)
            linear(f"blk.{i}.ffn_down", _N_EMBD, _N_FF, 0.5)
            norm(f"blk.{i}.layer_output_norm")
        return tensors


# As GGUF

_QUANTIZED = {
    "F32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "F16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "Q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_ALWAYS_F32 = ("position_embd.weight", "token_types.weight")


def write_embedder(path: Path, file_type: FileType = "F32", **metadata: object) -> Path:
    """The tiny embedder as convert_hf_to_gguf.py would write it: without its heads."""
    return _write_xlmr(path, tiny_embedder(), file_type, gguf.PoolingType.CLS, metadata)


def write_reranker(path: Path, file_type: FileType = "F32", **metadata: object) -> Path:
    labels = {"bert__classifier__output_labels": ["LABEL_0"]}
    return _write_xlmr(path, tiny_reranker(), file_type, gguf.PoolingType.RANK, labels | metadata)


def write_heads(folder: Path, model: Bert | None = None) -> None:
    """sparse_linear.pt and colbert_linear.pt, as they lie beside BGE-M3: the tiny embedder's."""
    for name, head in (model or tiny_embedder()).heads.items():
        write_pt(folder / f"{name}.pt", head.tensors())


def write_bert(
    path: Path,
    file_type: FileType = "F32",
    *,
    pieces: Mapping[str, str] = {},
    lowercase: bool | None = None,
) -> Path:
    """`pieces` are in the place of others."""
    model, pooling = tiny_bert(), gguf.PoolingType.MEAN
    return _write_wordpiece(path, model, file_type, pooling, pieces, lowercase)


def write_bert_reranker(path: Path, file_type: FileType = "F32") -> Path:
    return _write_wordpiece(path, tiny_bert_reranker(), file_type, gguf.PoolingType.RANK)


def _write_wordpiece(
    path: Path,
    model: Bert,
    file_type: FileType,
    pooling: gguf.PoolingType,
    pieces: Mapping[str, str] = {},
    lowercase: bool | None = None,
) -> Path:
    tokens = [pieces.get(token, token) for token in wordpieces()]
    writer = _bert_writer(path, model, file_type, pooling)
    if pooling == gguf.PoolingType.RANK:
        writer.add_classifier_output_labels(["LABEL_0"])
    writer.add_tokenizer_model("bert")
    if lowercase is not None:
        writer.add_bool("tokenizer.ggml.normalizer.lowercase", lowercase)
    # llama.cpp marks beginnings of words, where WordPiece marks what is none.
    writer.add_token_list(
        [t[2:] if t.startswith("##") else t if t.startswith("[") else f"▁{t}" for t in tokens]
    )
    writer.add_token_types([3 if token.startswith("[") else 1 for token in tokens])
    for name in ("pad", "unk", "cls", "sep", "mask"):
        token = tokens.index(f"[{name.upper()}]")
        writer.add_uint32(f"tokenizer.ggml.{_TOKEN_KEYS[name]}_token_id", token)
    _write_tensors(writer, model.tensors, file_type)
    return path


# As Qwen3-Reranker has it; llama.cpp puts the texts in.
JUDGE_TEMPLATE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: Given a web search query, retrieve relevant passages that "
    "answer the query\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


def write_decoder(
    path: Path,
    no_numbers_of: int | None = None,
    *,
    pooling: gguf.PoolingType | None = gguf.PoolingType.LAST,
    is_causal: bool = True,
    adds_eos: bool = True,
) -> Path:
    """Of one token it makes what is no number."""
    writer = _qwen3_writer(path, adds_eos=adds_eos)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    if not is_causal:
        writer.add_causal_attention(False)
    tensors = dict(tiny_decoder().tensors)
    if no_numbers_of is not None:
        table = tensors["token_embd.weight"].copy()
        table[no_numbers_of] = np.nan
        tensors["token_embd.weight"] = table
    _write_tensors(writer, tensors, "F32")
    return path


def write_judge(path: Path) -> Path:
    writer = _qwen3_writer(path, adds_eos=False)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    writer.add_classifier_output_labels(["yes", "no"])
    writer.add_chat_template([{"name": "rerank", "template": JUDGE_TEMPLATE}])
    _write_tensors(writer, tiny_judge().tensors, "F32")
    return path


def _qwen3_writer(path: Path, *, adds_eos: bool) -> gguf.GGUFWriter:
    tokens, scores, types = spm_vocabulary()
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_name("Tiny decoder of random weights")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(adds_eos)
    writer.add_context_length(_N_CTX)
    writer.add_block_count(_N_LAYER)
    writer.add_embedding_length(_N_EMBD)
    writer.add_feed_forward_length(_N_FF)
    writer.add_head_count(_N_HEAD)
    writer.add_head_count_kv(2)
    writer.add_key_length(_N_EMBD // _N_HEAD)
    writer.add_value_length(_N_EMBD // _N_HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    return writer


_TOKEN_KEYS = {"pad": "padding", "unk": "unknown", "cls": "bos", "sep": "seperator", "mask": "mask"}


@cache
def wordpieces() -> tuple[str, ...]:
    words = (
        "the of and to in is a for on with hello world quick brown fox jump over lazy dog what "
        "embedding model search query document capital france paris berlin germany weather rain"
    ).split()
    ends = "##s ##ing ##ed ##er".split()
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    inner = [f"##{char}" for char in letters if char.isalnum()]
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    return tuple(dict.fromkeys([*special, *words, *ends, *letters, *inner]))


def _write_xlmr(
    path: Path,
    model: Bert,
    file_type: FileType,
    pooling: gguf.PoolingType,
    metadata: Mapping[str, object],
) -> Path:
    """`metadata` replaces or adds keys, with `__` for a dot; None leaves a key out."""
    vocab, kind = unigram(), gguf.TokenType
    writer = _bert_writer(path, model, file_type, pooling)
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(list(vocab.pieces))
    writer.add_token_scores(list(vocab.scores))
    types = [kind.CONTROL] * 3 + [kind.UNKNOWN] + [kind.NORMAL] * (len(vocab.pieces) - 5)
    writer.add_token_types([*types, kind.CONTROL])
    writer.add_precompiled_charsmap(vocab.charsmap)
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    writer.add_bos_token_id(vocab.bos)
    writer.add_eos_token_id(vocab.eos)
    writer.add_sep_token_id(vocab.eos)
    writer.add_pad_token_id(vocab.pad)
    writer.add_unk_token_id(vocab.unk)
    writer.add_mask_token_id(vocab.mask)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    for name, value in metadata.items():
        key = name.replace("__", ".")
        writer.kv_data[0].pop(key, None)
        if value is not None:
            kind_of = gguf.GGUFValueType.get_type(value)
            sub_type = gguf.GGUFValueType.FLOAT32 if isinstance(value, np.ndarray) else None
            writer.add_key_value(key, value, kind_of, sub_type)
    _write_tensors(writer, model.tensors, file_type)
    return path


def _bert_writer(
    path: Path, model: Bert, file_type: FileType, pooling: gguf.PoolingType
) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("Tiny encoder of random weights")
    writer.add_block_count(model.n_layer)
    writer.add_context_length(model.n_ctx)
    writer.add_embedding_length(model.n_embd)
    writer.add_feed_forward_length(_N_FF)
    writer.add_head_count(model.n_head)
    writer.add_layer_norm_eps(model.eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(pooling)
    writer.add_token_type_count(1)
    writer.add_file_type(_QUANTIZED[file_type][1])
    return writer


def _write_tensors(
    writer: gguf.GGUFWriter, tensors: Mapping[str, Floats], file_type: FileType
) -> None:
    for name, values in tensors.items():
        kind = _QUANTIZED[file_type][0]
        if values.ndim == 1 or name in _ALWAYS_F32:
            kind = gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class _Reader(gguf.GGUFReader):
    """Steps over arrays: a vocabulary of 250,000 would take 15 seconds."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = struct.unpack_from("<IQ", self.data, orig_offs)
        pos = orig_offs + 12
        if kind == gguf.GGUFValueType.STRING:
            for _ in range(count):
                pos += 8 + struct.unpack_from("<Q", self.data, pos)[0]
        else:
            pos += count * np.dtype(self.gguf_scalar_to_np[gguf.GGUFValueType(kind)]).itemsize
        return pos - orig_offs, [], [], [gguf.GGUFValueType.ARRAY]


def bert_in(path: Path, heads: Mapping[str, Head] | None = None) -> Bert:
    """The weights of any BERT in GGUF, for the reference: a real model's too."""
    reader = _Reader(path)

    def number(key: str) -> Any:
        return reader.fields[f"bert.{key}"].parts[-1][0]

    tensors = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for tensor in reader.tensors
    }
    return Bert(
        tensors,
        n_head=int(number("attention.head_count")),
        n_ctx=int(number("context_length")),
        eps=float(number("attention.layer_norm_epsilon")),
        heads=heads or {},
    )


def vocabulary_in(path: Path) -> Unigram:
    """The vocabulary of any XLM-R in GGUF."""
    with open_header(path) as header:
        tokens = header.array("tokenizer.ggml.tokens")
        scores = header.floats("tokenizer.ggml.scores")
        charsmap = header.numbers("tokenizer.ggml.precompiled_charsmap", 1 << 24)
        assert tokens is not None
        assert scores is not None
        pieces = header.texts(tokens, range(tokens.count))
        return Unigram(tuple(pieces), tuple(scores.tolist()), charsmap.astype(np.uint8).tobytes())


# As Hugging Face directories


def write_hf_embedder(folder: Path) -> Path:
    return write_hf(folder, tiny_embedder(), unigram())


def write_hf_reranker(folder: Path) -> Path:
    return write_hf(folder, tiny_reranker(), unigram())


def hf_tensors(model: Bert, family: str = "xlm-roberta") -> dict[str, Floats]:
    """The weights by the names that transformers gives them."""
    is_bert = family == "bert"
    prefix = "" if "cls.weight" not in model.tensors else "bert." if is_bert else "roberta."
    tensors = {_hf_name(name, prefix): values for name, values in model.tensors.items()}
    if not is_bert:
        # Positions count from the padding id + 1 there; the first two rows are never used.
        name = f"{prefix}embeddings.position_embeddings.weight"
        unused = np.zeros((2, model.n_embd), np.float32)
        tensors[name] = np.concatenate([unused, tensors[name]])
        return tensors
    heads = {"classifier.dense": "bert.pooler.dense", "classifier.out_proj": "classifier"}
    for name in list(tensors):
        module, _, part = name.rpartition(".")
        if module in heads:
            tensors[f"{heads[module]}.{part}"] = tensors.pop(name)
    return tensors


_HF_NAMES = {
    "token_embd": "embeddings.word_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "token_embd_norm": "embeddings.LayerNorm",
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
    "cls": "classifier.dense",
    "cls.output": "classifier.out_proj",
}


def _hf_name(name: str, prefix: str) -> str:
    module, _, part = name.rpartition(".")
    if module.startswith("blk."):
        _, layer, module = module.split(".")
        return f"{prefix}encoder.layer.{layer}.{_HF_NAMES[module]}.{part}"
    return f"{'' if module.startswith('cls') else prefix}{_HF_NAMES[module]}.{part}"


def write_hf(folder: Path, model: Bert, vocab: Unigram) -> Path:
    """An XLM-R with its vocabulary, and with its heads where it has them."""
    _write_network(folder, model, "xlm-roberta", len(vocab.pieces))
    write_heads(folder, model)
    write_json(folder / "tokenizer.json", _hf_tokenizer(vocab))
    specials = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>"}
    specials |= {"unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
    write_json(
        folder / "tokenizer_config.json",
        {f"{name}_token": token for name, token in specials.items()}
        | {"model_max_length": model.n_ctx, "tokenizer_class": "XLMRobertaTokenizer"},
    )
    return folder


def write_hf_bert(folder: Path, model: Bert) -> Path:
    """A BERT with WordPiece, and with mean pooling where it is no cross-encoder."""
    _write_network(folder, model, "bert", len(wordpieces()))
    write_json(folder / "tokenizer.json", _hf_wordpiece())
    if "cls.weight" not in model.tensors:
        (folder / "1_Pooling").mkdir()
        write_json(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    return folder


def _write_network(folder: Path, model: Bert, family: str, n_vocab: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    is_bert, is_classifier = family == "bert", "cls.weight" in model.tensors
    kind = "ForSequenceClassification" if is_classifier else "Model"
    write_safetensors(folder / "model.safetensors", hf_tensors(model, family))
    config = {
        "architectures": [("Bert" if is_bert else "XLMRoberta") + kind],
        "model_type": family,
        "vocab_size": n_vocab,
        "hidden_size": model.n_embd,
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "intermediate_size": len(model.tensors["blk.0.ffn_up.weight"]),
        "max_position_embeddings": model.n_ctx if is_bert else model.n_ctx + 2,
        "type_vocab_size": len(model.tensors["token_types.weight"]),
        "layer_norm_eps": model.eps,
        "pad_token_id": 0 if is_bert else Unigram.pad,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "torch_dtype": "float32",
    }
    if not is_bert:
        config |= {"bos_token_id": Unigram.bos, "eos_token_id": Unigram.eos}
    if is_classifier:
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    write_json(folder / "config.json", config)


def _hf_tokenizer(vocab: Unigram) -> dict[str, Any]:
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _control(token, vocab.pieces[token], lstrip=token == vocab.mask)
            for token in (0, 1, 2, 3, vocab.mask)
        ],
        "normalizer": {
            "type": "Precompiled",
            "precompiled_charsmap": base64.b64encode(vocab.charsmap).decode(),
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace],
        },
        "post_processor": around("<s> A </s>", "<s> A </s> </s> B </s>", vocab.pieces),
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": vocab.unk,
            "vocab": list(zip(vocab.pieces, vocab.scores, strict=True)),
            "byte_fallback": False,
        },
    }


def _hf_wordpiece() -> dict[str, Any]:
    pieces = wordpieces()
    return {
        "version": "1.0",
        "truncation": {
            "direction": "Right",
            "max_length": 8,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": None,
        "added_tokens": [_control(token, pieces[token]) for token in range(5)],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": around("[CLS] A [SEP]", "[CLS] A [SEP] B [SEP]", pieces),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {piece: token for token, piece in enumerate(pieces)},
        },
    }


def _control(token: int, content: str, *, lstrip: bool = False) -> dict[str, Any]:
    flags = {"single_word": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token, "content": content, "lstrip": lstrip, **flags}
