"""Encoders and cross-encoders out of Hugging Face directories, through mlx.

Everything is float32: that is exact for the weights as they are published, and a CPU is slow with
less. One thread calls mlx.
"""

import threading
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from engine.backends.base import Encoder, Floats, ReportProgress, Specials
from engine.backends.hf_tokenizer import FolderTokenizer
from engine.backends.padded import Inputs, PaddedEncoder
from engine.model_file import ModelFile
from engine.model_folder import config_in, read_model_folder, weights_in
from engine.tensors import read_tensors
from engine.wire import WorkerSpec
from errors import ModelLoadFailed

if TYPE_CHECKING:
    from engine.backends.mlx_bert import Shape

INSTALL = "`./setup.sh --mlx`, or `pip install -r requirements-mlx.txt`"
CACHE_BYTES = 256 << 20  # of memory that mlx keeps for arrays to come
_PREFIXES = ("roberta.", "bert.")  # of names, where there is a head beside the network
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def load(spec: WorkerSpec, progress: ReportProgress) -> Encoder:
    return MlxEncoder(spec, progress)


class MlxEncoder(PaddedEncoder):
    def __init__(self, spec: WorkerSpec, progress: ReportProgress) -> None:
        facts = read_model_folder(Path(spec.model_path))
        super().__init__(spec, facts)
        progress(0.0)
        self._mx, bert, tokenizers = _libraries()
        shape = _shape(facts, bert, ranks=self.scale is not None)
        self.tokenizer, self.specials, self.padding = _tokenizer(facts, tokenizers)
        tensors = _tensors(facts, shape)
        progress(0.5)
        self._open_device(on_gpu=spec.n_gpu_layers != 0)
        weights = {name: self._mx.array(tensors.pop(name)) for name in list(tensors)}
        self._network = bert.Bert(shape, weights, self.ask)
        progress(1.0)

    def _open_device(self, *, on_gpu: bool) -> None:
        mx = self._mx
        if not on_gpu:
            mx.set_default_device(mx.cpu)
        mx.set_cache_limit(CACHE_BYTES)
        if mx.default_device().type == mx.DeviceType.cpu:
            mx.disable_compile()  # it would call a C++ compiler, for seconds, and gain nothing

    def compute(self, inputs: Inputs) -> Floats:
        self.ask()
        mx = self._mx
        mask = None if inputs.mask.all() else mx.array(inputs.mask.astype(bool))
        types = None if inputs.types is None else mx.array(inputs.types)
        computed = self._network.scores if self.scale is not None else self._network.rows
        found: Floats = np.array(computed(mx.array(inputs.ids), mask, types))
        return found

    def close(self) -> None:
        """To be called by the thread that loaded, whose streams may not outlive it."""
        self._network = None
        self._mx.clear_cache()
        if threading.current_thread() is not threading.main_thread():
            self._mx.clear_streams()


def _libraries() -> tuple[Any, Any, Any]:
    try:
        mx, tokenizers = import_module("mlx.core"), import_module("tokenizers")
        return mx, import_module("engine.backends.mlx_bert"), tokenizers
    except ImportError as error:
        raise ModelLoadFailed(
            f"The backend mlx needs mlx and tokenizers ({error}): run {INSTALL}."
        ) from error


def _fail(facts: ModelFile, reason: str) -> NoReturn:
    raise ModelLoadFailed(f"{facts.name} {reason}.")


def _shape(facts: ModelFile, bert: Any, *, ranks: bool) -> "Shape":
    """Raises ModelLoadFailed for what the network is not."""
    config = config_in(facts.path)
    assert config is not None
    if "quantization" in config:
        _fail(facts, "is quantized, which the backend mlx runs for chat only; take the original")
    if config.get("position_embedding_type", "absolute") != "absolute" or config.get("is_decoder"):
        _fail(facts, "is no plain encoder (position_embedding_type, is_decoder in config.json)")
    activation = str(config.get("hidden_act", "gelu"))
    if activation not in bert.ACTIVATIONS:
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
    n_head, head = number("num_attention_heads", 0), None
    if facts.n_embd % n_head:
        _fail(facts, f"cannot share {facts.n_embd} numbers among {n_head} heads of attention")
    if ranks:
        head = "bert" if facts.architecture == "bert" else "roberta"
    shape: Shape = bert.Shape(
        n_vocab=facts.n_vocab,
        n_embd=facts.n_embd,
        n_layer=facts.n_layer,
        n_head=n_head,
        n_ff=number("intermediate_size", 0),
        n_positions=n_positions,
        first_position=first_position,
        n_types=number("type_vocab_size", 2),
        eps=eps,
        activation=activation,
        head=head,
    )
    return shape


def _named(tensors: Mapping[str, Floats]) -> dict[str, Floats]:
    """The same by the names that they have where there is no head."""
    found = {}
    for name, values in tensors.items():
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
        found[name] = values
    return found


def _tensors(facts: ModelFile, shape: "Shape") -> dict[str, Floats]:
    """All that the network needs, and no more. Raises ModelLoadFailed."""
    needed = shape.tensors()
    found: dict[str, Floats] = {}
    for file in weights_in(facts.path):
        named = _named(read_tensors(file))
        found |= {name: values for name, values in named.items() if name in needed}
    for name, wanted in needed.items():
        if name not in found:
            what = "no head that scores pairs" if "classifier" in name else "not all weights"
            _fail(facts, f"has {what} ({name} is missing); download it again")
        if found[name].shape != wanted:
            _fail(facts, f"has other weights than its config.json says ({name}); download it again")
    return found


def _tokenizer(facts: ModelFile, tokenizers: Any) -> tuple[FolderTokenizer, Specials, int]:
    """With the tokens that it puts around texts, and the one that fills up."""
    path = facts.path / "tokenizer.json"
    if not path.is_file():
        _fail(facts, "has no tokenizer.json, which the backend mlx needs")
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
