"""What a Hugging Face directory says about a model that generates, without loading it."""

import json
import re
import struct
import sys
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec

from engine.file_names import TOOL_TEMPLATE
from engine.model_file import CONTROL_BY_NAME, ModelFile, name_of
from errors import ModelLoadFailed

T = TypeVar("T")

FLOAT_BYTES = 2 if sys.platform == "darwin" else 4  # of activations: CPUs are slow with halves
_HALVES = ("F16", "BF16")
_MAX_BYTES = 256 << 20  # of one of the JSON files, or of a header
_UNBOUNDED = 1 << 20  # tokens, for models without a longest context
# Ends of texts, turns and infilled middles that llama.cpp takes for such, whatever files say.
_ENDS = frozenset(
    "<|endoftext|> <|end_of_text|> <|im_end|> <|eot_id|> <|eom_id|> <end_of_turn> </s> <eos> "
    "<end_of_utterance> <｜end▁of▁sentence｜> <|fim_pad|> <fim-pad> <fim_pad> <PAD> <|fim_repo|> "
    "<|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|> <|end|> <|return|> <|call|> <|calls|> "
    "<|flush|> <turn|> <|tool_response> _<EOT> [EOT] [EOS] [PAD]".split()
)
# Added tokens that llama.cpp's converter takes for control tokens, whatever files say.
_CONTROL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
# Of harmony, and of Solar Open: where both are, <|end|> ends a message and not the turn.
_TURNS = ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"})
# Kinds of layers that keep a state and no cells, and of those that keep nothing.
_RECURRENT, _KEEPING_NOTHING = ("M", "mamba", "conv", "linear_attention"), ("-", "E", "mlp", "moe")
# The numbers whose product is the size of a state. Convolutions beside one are small.
_STATES = (
    ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),  # Qwen 3.5
    ("mamba_num_heads", "mamba_head_dim", "ssm_state_size"),  # Nemotron H
    ("mamba_n_heads", "mamba_d_head", "mamba_d_state"),  # Granite 4, Falcon H1
    ("conv_L_cache", "hidden_size"),  # LFM2
)
_STATE_FLOAT_BYTES = 4  # whatever the activations are
# Of the families with latent attention those for which mlx-lm keeps keys and values of each head.
_UNCOMPRESSED = ("deepseek_v2", "minicpm3", "youtu_llm")
_GENERATING = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


class AddedToken(msgspec.Struct):
    content: str
    id: int = -1
    special: bool = False


class Vocabulary(msgspec.Struct):
    """The part `model` of tokenizer.json."""

    type: str = "BPE"
    vocab: dict[str, int] | list[Any] = {}


class TokenizerFile(msgspec.Struct):
    """tokenizer.json, as far as it is of interest here."""

    model: Vocabulary
    added_tokens: list[AddedToken] = []
    post_processor: msgspec.Raw = msgspec.Raw(b"null")
    decoder: msgspec.Raw = msgspec.Raw(b"null")


class TokenizerConfig(msgspec.Struct):
    """tokenizer_config.json, likewise."""

    chat_template: str | list[dict[str, str]] | None = None
    bos_token: str | AddedToken | None = None
    eos_token: str | AddedToken | None = None
    add_bos_token: bool | None = None
    added_tokens_decoder: dict[str, AddedToken] = {}


class WeightIndex(msgspec.Struct):
    """model.safetensors.index.json, likewise."""

    weight_map: dict[str, str] = {}


def read_chat_folder(path: Path) -> ModelFile:
    """The facts of the model in a directory, or ModelLoadFailed with one sentence that names it.

    The sentence holds the directory's name and never where it is: it goes to HTTP clients.
    `size_bytes` are those of the weights in memory.
    """
    if not path.is_dir():
        _fail(path, "is no directory; the backend mlx takes one with config.json and safetensors")
    config = _config(path / "config.json")
    architectures = [str(one) for one in _part(path, config, "architectures", list)]
    if architectures and not any(one.endswith(_GENERATING) for one in architectures):
        _fail(path, f"does not generate text: it is a {', '.join(architectures)}")
    text = config | _part(path, config, "text_config", dict)  # of a model that also sees or hears
    tokenizer, settings = read_tokenizer(path)
    special = {token.content for token in _added(tokenizer, settings) if _is_control(token)}
    bos, eos = _content(settings.bos_token), _content(settings.eos_token)
    n_listed = len(_layers(text))
    n_layer = _number(path, text, "num_hidden_layers", "n_layer", "n_layers", default=n_listed)
    n_embd = _number(path, text, "hidden_size", "d_model", "n_embd")
    kv_bytes_per_token, state_bytes = _kept(path, text, n_layer, n_embd)
    pieces = [*tokenizer.model.vocab, *(token.content for token in tokenizer.added_tokens)]
    return ModelFile(
        path=path,
        size_bytes=_weight_bytes(path),
        architecture=str(text.get("model_type", "")),
        name=name_of(path),
        n_ctx_train=_number(path, text, "max_position_embeddings", default=_UNBOUNDED),
        n_layer=n_layer,
        n_embd=n_embd,
        n_vocab=_number(path, text, "vocab_size", default=len(pieces)),
        max_token_bytes=max(len(piece.encode("utf-8", "replace")) for piece in pieces),
        kv_bytes_per_token=kv_bytes_per_token,
        chat_template=_template(path, settings),
        bos_token=bos,
        eos_token=eos,
        add_bos=bool(bos) and adds_bos(tokenizer, settings, bos),
        control_tokens=tuple(sorted(special - {""}, key=lambda text: (-len(text), text))),
        kind="chat",
        tool_template=_tool_template(path, settings),
        state_bytes=state_bytes,
    )


def read_tokenizer(path: Path) -> tuple[TokenizerFile, TokenizerConfig]:
    """What the two files say. Raises ModelLoadFailed."""
    file = path / "tokenizer.json"
    if not file.exists():
        _fail(path, "has no tokenizer.json; take a conversion that has one")
    tokenizer = _decoded(file, TokenizerFile)
    if tokenizer.model.type != "BPE" or not isinstance(tokenizer.model.vocab, dict):
        _fail(path, f"has a tokenizer of the type {tokenizer.model.type}, and only BPE is read")
    config = path / "tokenizer_config.json"
    return tokenizer, _decoded(config, TokenizerConfig) if config.is_file() else TokenizerConfig()


def end_tokens(path: Path, tokenizer: TokenizerFile, settings: TokenizerConfig) -> set[int]:
    """Ids of all tokens with which an answer ends. Raises ModelLoadFailed."""
    ends: set[int | None] = set()
    for name in ("generation_config.json", "config.json"):
        if (path / name).is_file():
            config = _config(path / name)
            text = _part(path, config, "text_config", dict)
            found = config.get("eos_token_id", text.get("eos_token_id"))
            ends.update(found if isinstance(found, list) else [found])
    by_name = {token.content: token.id for token in tokenizer.added_tokens}
    has_messages = any(by_name.keys() >= both for both in _TURNS)
    names = _ENDS - {"<|end|>"} if has_messages else _ENDS
    ends.update(by_name.get(name) for name in {_content(settings.eos_token), *names})
    return {token for token in ends if isinstance(token, int)}


def suppressed_tokens(path: Path) -> list[int]:
    """Ids of tokens that the model never says. Raises ModelLoadFailed."""
    file = path / "generation_config.json"
    found = _config(file).get("suppress_tokens") if file.is_file() else None
    return [token for token in found or () if isinstance(token, int) and token >= 0]


def adds_bos(tokenizer: TokenizerFile, settings: TokenizerConfig, bos: str) -> bool:
    """Whether the tokenizer puts a BOS before a text."""
    template = bytes(tokenizer.post_processor)
    if b"TemplateProcessing" in template:
        return msgspec.json.encode(bos) in template.partition(b'"pair"')[0]
    return bool(settings.add_bos_token)


def is_byte_level(tokenizer: TokenizerFile) -> bool:
    """The vocabulary spells each byte as a character, as GPT-2 does; else as SentencePiece."""
    return b'"ByteLevel"' in bytes(tokenizer.decoder)


def _added(tokenizer: TokenizerFile, settings: TokenizerConfig) -> Iterator[AddedToken]:
    yield from tokenizer.added_tokens
    yield from settings.added_tokens_decoder.values()


def _is_control(token: AddedToken) -> bool:
    text = token.content
    return token.special or text in CONTROL_BY_NAME or _CONTROL.fullmatch(text) is not None


def _content(token: str | AddedToken | None) -> str:
    return token.content if isinstance(token, AddedToken) else token or ""


def _template(path: Path, settings: TokenizerConfig) -> str | None:
    beside = path / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8", errors="replace")
    named = settings.chat_template
    if isinstance(named, list):
        return _by_name(named).get("default")
    older = path / "chat_template.json"
    if named is None and older.is_file():
        named = _decoded(older, TokenizerConfig).chat_template
    return named if isinstance(named, str) else None


def _tool_template(path: Path, settings: TokenizerConfig) -> str | None:
    if (beside := path / TOOL_TEMPLATE).is_file():
        return beside.read_text(encoding="utf-8", errors="replace")
    if (path / "chat_template.jinja").is_file():  # in place of all that the settings have
        return None
    named = settings.chat_template
    return _by_name(named).get("tool_use") if isinstance(named, list) else None


def _by_name(templates: list[dict[str, str]]) -> dict[str | None, str | None]:
    return {one.get("name"): one.get("template") for one in templates}


def _weight_bytes(path: Path) -> int:
    """Of all tensors in memory, where floats of two bytes may need more."""
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        _fail(path, "has no model.safetensors; download it again")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        named = set(_decoded(index, WeightIndex).weight_map.values())
        for missing in sorted(named - {file.name for file in files}):
            _fail(path, f"lacks {missing}; download it again")
    return sum(_tensor_bytes(path, file) for file in files)


def _tensor_bytes(path: Path, file: Path) -> int:
    """Of a file of safetensors: the length of a header, that in JSON, and the tensors."""
    total = 0
    try:
        with file.open("rb") as stream:
            (n_header,) = struct.unpack("<Q", stream.read(8))
            if n_header > _MAX_BYTES:
                _fail(path, f"has a {file.name} that is damaged; download it again")
            header = msgspec.json.decode(stream.read(n_header), type=dict[str, Any])
            end = 8 + n_header
            for key, tensor in header.items():
                if key != "__metadata__":
                    start, stop = tensor["data_offsets"]
                    end = max(end, 8 + n_header + stop)
                    total += (stop - start) * (
                        FLOAT_BYTES // 2 if tensor["dtype"] in _HALVES else 1
                    )
            is_whole = end <= file.stat().st_size
    except (OSError, struct.error, msgspec.DecodeError, LookupError, TypeError, ValueError):
        _fail(path, f"has a {file.name} that cannot be read; download it again")
    if not is_whole:
        _fail(path, f"has a {file.name} that is cut short; download it again")
    return total


def _part(path: Path, config: dict[str, Any], key: str, kind: type[T]) -> T:
    """An empty one where there is none."""
    found = config.get(key) or kind()
    if type(found) is not kind:
        _fail(path, f"has no {key} in its config.json that makes sense; download it again")
    return found


def _kept(path: Path, text: dict[str, Any], n_layer: int, n_embd: int) -> tuple[int, int]:
    """How many bytes a sequence keeps for each token, and how many in its states.

    An upper bound: behind sliding windows, and in families that say it in other words, it is less.
    """
    n_head = _number(path, text, "num_attention_heads", "n_head", default=1)
    head_size = _number(path, text, "head_dim", default=n_embd // n_head)
    n_kept = 2 * _number(path, text, "num_key_value_heads", default=n_head) * head_size
    if text.get("kv_lora_rank"):
        n_rope = _number(path, text, "qk_rope_head_dim", default=head_size, least=0)
        n_kept = _number(path, text, "kv_lora_rank") + n_rope
        if text.get("index_head_dim"):
            n_kept += 2 * _number(path, text, "index_head_dim")
        if text.get("model_type") in _UNCOMPRESSED:
            n_key = _number(path, text, "qk_nope_head_dim", default=head_size) + n_rope
            n_kept = n_head * (n_key + _number(path, text, "v_head_dim", default=head_size))
    n_attention, n_recurrent = _n_keeping(text, n_layer)
    named = (keys for keys in _STATES if all(isinstance(text.get(key), int) for key in keys))
    keys = next(named, None)
    if keys is None or not all(text[key] for key in keys):  # not known, and taken for attention
        return min(n_attention + n_recurrent, n_layer) * n_kept * FLOAT_BYTES, 0
    n_state = prod(_number(path, text, key) for key in keys)
    return n_attention * n_kept * FLOAT_BYTES, n_recurrent * n_state * _STATE_FLOAT_BYTES


def _n_keeping(text: dict[str, Any], n_layer: int) -> tuple[int, int]:
    """How many layers keep cells, and how many a state; all may do both, as Falcon H1's do."""
    layers = _layers(text)
    if len(layers) == n_layer:
        n_recurrent = sum(layer in _RECURRENT for layer in layers)
        return n_layer - n_recurrent - sum(map(_KEEPING_NOTHING.count, layers)), n_recurrent
    indices, interval = text.get("full_attn_idxs"), text.get("full_attention_interval")
    n_attention = n_layer
    if isinstance(indices, list):
        n_attention = min(len(indices), n_layer)
    elif isinstance(interval, int) and interval > 0:
        n_attention = n_layer // interval
    return n_attention, n_layer if n_attention == n_layer else n_layer - n_attention


def _layers(text: dict[str, Any]) -> str | list[Any]:
    """What each layer is, where the file says it."""
    named = map(text.get, ("hybrid_override_pattern", "layers_block_type", "layer_types"))
    return next((layers for layers in named if isinstance(layers, str | list)), [])


def _number(
    path: Path, config: dict[str, Any], *keys: str, default: int | None = None, least: int = 1
) -> int:
    """The first of these that is there."""
    found = next((config[key] for key in keys if config.get(key) is not None), default)
    if not isinstance(found, int) or not least <= found < 1 << 31:
        _fail(path, f"has no {keys[0]} in its config.json; download it again")
    return found


def _config(file: Path) -> dict[str, Any]:
    """Written by Python, whose JSON has Infinity in it."""
    return _read(file, lambda data: msgspec.convert(json.loads(data), dict[str, Any]))


def _decoded(file: Path, kind: Any) -> Any:
    return _read(file, lambda data: msgspec.json.decode(data, type=kind))


def _read(file: Path, decode: Callable[[bytes], T]) -> T:
    try:
        if file.stat().st_size > _MAX_BYTES:
            _fail(file.parent, f"has a {file.name} that is too big")
        return decode(file.read_bytes())
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError):
        _fail(file.parent, f"has no {file.name} that can be read; download it again")


def _fail(path: Path, reason: str) -> NoReturn:
    raise ModelLoadFailed(f"{name_of(path)} {reason}.")
