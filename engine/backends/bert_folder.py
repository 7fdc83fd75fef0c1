"""What a Hugging Face directory holds of a BERT, a RoBERTa or an XLM-R, for those who run it."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from engine.backends.base import Floats, Specials
from engine.backends.hf_tokenizer import FolderTokenizer
from engine.model_file import ModelFile
from engine.model_folder import config_in, weights_in
from engine.tensors import read_tensors, tensor_names
from errors import ModelLoadFailed

Head = Literal["roberta", "bert"]  # how a cross-encoder makes a score of its first row
Activation = Literal["gelu", "gelu_tanh", "relu"]

_ACTIVATIONS: dict[str, Activation] = {  # by the names that transformers has for them
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_PREFIXES = ("roberta.", "bert.")  # of names, where there is a head beside the network
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True, slots=True)
class Shape:
    """What a network looks like, as its config.json says."""

    n_vocab: int
    n_embd: int
    n_layer: int
    n_head: int
    n_ff: int
    n_positions: int  # rows of the table, also those that are never used
    first_position: int
    n_types: int
    eps: float
    activation: Activation
    head: Head | None

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of all that the network needs."""
        found: dict[str, tuple[int, ...]] = {}
        n = self.n_embd

        def norm(name: str) -> None:
            found[f"{name}.weight"] = found[f"{name}.bias"] = (n,)

        def linear(name: str, n_out: int, n_in: int) -> None:
            found[f"{name}.weight"], found[f"{name}.bias"] = (n_out, n_in), (n_out,)

        for table, rows in (
            ("word", self.n_vocab), ("position", self.n_positions), ("token_type", self.n_types)
        ):  # fmt: skip
            found[f"embeddings.{table}_embeddings.weight"] = (rows, n)
        norm("embeddings.LayerNorm")
        for layer in self.layers:
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                linear(f"{layer}.attention.{part}", n, n)
            norm(f"{layer}.attention.output.LayerNorm")
            linear(f"{layer}.intermediate.dense", self.n_ff, n)
            linear(f"{layer}.output.dense", n, self.n_ff)
            norm(f"{layer}.output.LayerNorm")
        for name, n_out in self.head_layers:
            linear(name, n_out, n)
        return found

    @property
    def layers(self) -> list[str]:
        """What the names of each layer's tensors begin with."""
        return [f"encoder.layer.{number}" for number in range(self.n_layer)]

    @property
    def head_layers(self) -> list[tuple[str, int]]:
        """Name and width of what makes a score of the first row, with a tanh between the two."""
        if self.head is None:
            return []
        if self.head == "roberta":
            return [("classifier.dense", self.n_embd), ("classifier.out_proj", 1)]
        return [("pooler.dense", self.n_embd), ("classifier", 1)]


def _fail(facts: ModelFile, reason: str) -> NoReturn:
    raise ModelLoadFailed(f"{facts.name} {reason}.")


def read_shape(facts: ModelFile, *, ranks: bool) -> Shape:
    """Raises ModelLoadFailed for what no such network is."""
    config = config_in(facts.path)
    assert config is not None
    if "quantization" in config:
        _fail(facts, "is quantized, which only chat models may be; take the original")
    positions = config.get("position_embedding_type") or "absolute"
    if positions != "absolute" or config.get("is_decoder"):
        _fail(facts, "is no plain encoder (position_embedding_type, is_decoder in config.json)")
    activation = str(config.get("hidden_act", "gelu"))
    if activation not in _ACTIVATIONS:
        _fail(facts, f"has the activation {activation!r}, which is not known here")

    def number(key: str, default: int) -> int:
        value = config.get(key, default)
        if not isinstance(value, int) or value < 1:
            _fail(facts, f"has no {key} in its config.json that makes sense; download it again")
        return value

    n_positions = number("max_position_embeddings", 0)
    first_position = n_positions - facts.n_ctx_train
    if first_position and config.get("pad_token_id", 1) != first_position - 1:
        _fail(facts, "counts positions from another pad_token_id than its family does")
    eps = config.get("layer_norm_eps", 1e-12)
    if not isinstance(eps, float):
        _fail(facts, "has no layer_norm_eps in its config.json that makes sense; download it again")
    n_head = number("num_attention_heads", 0)
    if facts.n_embd % n_head:
        _fail(facts, f"cannot share {facts.n_embd} numbers among {n_head} heads of attention")
    return Shape(
        n_vocab=facts.n_vocab,
        n_embd=facts.n_embd,
        n_layer=facts.n_layer,
        n_head=n_head,
        n_ff=number("intermediate_size", 0),
        n_positions=n_positions,
        first_position=first_position,
        n_types=number("type_vocab_size", 2),
        eps=eps,
        activation=_ACTIVATIONS[activation],
        head=_head(facts) if ranks else None,
    )


def _head(facts: ModelFile) -> Head:
    return "bert" if facts.architecture == "bert" else "roberta"


def read_weights(facts: ModelFile, shape: Shape) -> dict[str, Floats]:
    """All that the network needs, and no more. Raises ModelLoadFailed."""
    needed = shape.tensors()
    found: dict[str, Floats] = {}
    for file in weights_in(facts.path):
        named = {_bare(name): values for name, values in read_tensors(file).items()}
        found |= {name: values for name, values in named.items() if name in needed}
    _check_names(facts, needed, found)
    for name, wanted in needed.items():
        if found[name].shape != wanted:
            _fail(facts, f"has other weights than its config.json says ({name}); download it again")
    return found


def check_weights(facts: ModelFile, *, ranks: bool) -> None:
    """For libraries that make weights at random where they find none. Raises ModelLoadFailed."""
    shape = Shape(
        n_vocab=facts.n_vocab, n_embd=facts.n_embd, n_layer=facts.n_layer, n_head=0, n_ff=0,
        n_positions=0, first_position=0, n_types=0, eps=0.0, activation="gelu",
        head=_head(facts) if ranks else None,
    )  # fmt: skip
    found = {_bare(name) for file in weights_in(facts.path) for name in tensor_names(file)}
    _check_names(facts, shape.tensors(), found)


def _check_names(facts: ModelFile, needed: Collection[str], found: Collection[str]) -> None:
    for name in needed:
        if name not in found:
            what = "no head that scores pairs" if "classifier" in name else "not all weights"
            _fail(facts, f"has {what} ({name} is missing); download it again")


def _bare(name: str) -> str:
    """The name that a tensor has where there is no head."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    for old, new in _OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def read_tokenizer(facts: ModelFile, tokenizers: Any) -> tuple[FolderTokenizer, Specials, int]:
    """With the tokens that it puts around texts, and the one that fills up. `tokenizers` is the
    library. Raises ModelLoadFailed."""
    path = facts.path / "tokenizer.json"
    if not path.is_file():
        _fail(facts, "has no tokenizer.json, without which its backend cannot read texts")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        around = tokenizer.encode("", "")
    except Exception as error:  # the library raises nothing more special
        raise ModelLoadFailed(
            f"{facts.name} has a tokenizer.json that cannot be read; download it again."
        ) from error
    ids = [i for i, special in zip(around.ids, around.special_tokens_mask, strict=True) if special]
    if len(ids) < 3:
        _fail(facts, "has a tokenizer.json that puts no tokens around texts; take the original")
    begin, *between, end = ids
    padding, unknown = (
        next((i for name in names if (i := tokenizer.token_to_id(name)) is not None), None)
        for names in (("<pad>", "[PAD]"), ("<unk>", "[UNK]"))
    )
    unused = {begin, end, padding, unknown} - {None}
    controls = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    specials = Specials(begin, end, tuple(between), frozenset(unused))
    folder_tokenizer = FolderTokenizer(
        tokenizer, facts.n_vocab, begin=begin, unknown=unknown, controls=controls
    )
    return folder_tokenizer, specials, end if padding is None else padding
