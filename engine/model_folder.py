"""What a Hugging Face directory says about an encoder, without loading it and without torch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from engine.file_names import WEIGHTS
from engine.model_file import Kind, ModelFile, name_of
from engine.types import Pooling
from errors import ModelLoadFailed


class _Family(NamedTuple):
    n_unused: int  # rows of the table of positions: they begin after the padding's id
    max_token_bytes: int  # at least; reading all pieces would take long


_FAMILIES = {
    "xlm-roberta": _Family(2, 64),
    "roberta": _Family(2, 128),
    "bert": _Family(0, 64),
}
_HALVES = ("float16", "bfloat16")  # weights that are twice as large once they are computed with
_TOKENIZERS = ("tokenizer.json", "sentencepiece.bpe.model", "vocab.txt")
_POOLINGS: dict[str, Pooling] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_POOLING_FLAGS = {  # which said the same before sentence-transformers 5.4; several may be set
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_POSITIONS = ("absolute", "relative_key", "relative_key_query")  # that are a family's own
_MODULES = {"Transformer", "Pooling", "Normalize"}  # sentence-transformers' that we know
_MAX_CONFIG_BYTES = 1 << 20
_MAX_NUMBER = (1 << 31) - 1


def read_model_folder(path: Path) -> ModelFile:
    """The facts of the encoder in a directory, or ModelLoadFailed with one sentence that names it.

    The sentence holds the directory's name and never where it is: it goes to HTTP clients.
    """
    name = name_of(path)

    def fail(reason: str) -> NoReturn:
        raise ModelLoadFailed(f"{name} {reason}.")

    if path.is_file():
        fail(
            "is a file; mlx, onnx and flag take a Hugging Face directory, and llamacpp a GGUF file"
        )
    if not path.is_dir():
        fail("is not there; give the path of a Hugging Face directory")
    config = config_in(path)
    if config is None:
        fail("has no config.json that can be read; give a whole Hugging Face directory")
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        fail(f"is of the family {family!r}, and directories may be of {known}")
    weights = weights_in(path)
    if not weights:
        fail("has no model.safetensors and no pytorch_model.bin; download it again")
    if not any((path / tokenizer).is_file() for tokenizer in _TOKENIZERS):
        fail("has no tokenizer.json; download it again")
    positions = config.get("position_embedding_type") or "absolute"
    if positions not in _POSITIONS:
        fail(
            f"has positions of the kind {positions!r}, as its own code makes them, which is not run"
        )
    kind = _kind(config, fail)
    if kind == "embedding" and (modules := _modules_in(path) - _MODULES):
        fail(f"has layers that are not computed here ({', '.join(sorted(modules))})")
    n_unused, max_token_bytes = _FAMILIES[family]
    is_half = (config.get("dtype") or config.get("torch_dtype")) in _HALVES

    def size_of(key: str) -> int:
        value = config.get(key)
        if not isinstance(value, int) or not 0 < value <= _MAX_NUMBER:
            fail(f"has no {key} in its config.json; download it again")
        return value

    return ModelFile(
        path=path,
        size_bytes=sum(file.stat().st_size for file in weights) * (2 if is_half else 1),
        architecture=family,
        name=name,
        n_ctx_train=max(size_of("max_position_embeddings") - n_unused, 1),
        n_layer=size_of("num_hidden_layers"),
        n_embd=size_of("hidden_size"),
        n_vocab=size_of("vocab_size"),
        max_token_bytes=max_token_bytes,
        kv_bytes_per_token=0,
        chat_template=None,
        bos_token="",
        eos_token="",
        add_bos=False,
        control_tokens=(),
        kind=kind,
    )


def pooling_in(path: Path) -> Pooling | None:
    """How the rows of its tokens become a vector, where sentence-transformers' file says it. Raises
    ModelLoadFailed where it says something else than one of ours."""
    config = config_in(path / "1_Pooling") or {}
    flags = [mode for key, mode in _POOLING_FLAGS.items() if config.get(key) is True]
    named = config.get("pooling_mode") or flags
    modes = [str(mode) for mode in (named if isinstance(named, list) else [named])]
    if not modes:
        return None
    if len(modes) > 1 or modes[0] not in _POOLINGS:
        raise ModelLoadFailed(
            f"{name_of(path)} makes a vector of its rows in a way that is not computed here "
            f"({', '.join(modes)}). POOLING of its tier, or --pooling of a converter, can be cls, "
            "mean or last."
        )
    return _POOLINGS[modes[0]]


def weights_in(path: Path) -> list[Path]:
    """The files with the weights, which are one where the model is not split."""
    found = (sorted(path.glob(pattern)) for pattern in WEIGHTS)
    return next(filter(None, found), [])


def config_in(path: Path) -> dict[str, Any] | None:
    """The config.json of a directory; None where there is none that can be read."""
    try:
        with (path / "config.json").open("rb") as file:
            found = json.loads(file.read(_MAX_CONFIG_BYTES))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _modules_in(path: Path) -> set[str]:
    """What sentence-transformers makes of a text's rows, one after the other."""
    try:
        modules = json.loads((path / "modules.json").read_bytes())
        return {str(module["type"]).rpartition(".")[2] for module in modules}
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def _kind(config: dict[str, Any], fail: Callable[[str], NoReturn]) -> Kind:
    named = config.get("architectures")
    architectures = [str(name) for name in named] if isinstance(named, list) else []
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        labels = config.get("id2label")
        if not isinstance(labels, dict) or len(labels) != 1:
            fail("tells several classes apart, where a reranker gives one score")
        return "reranker"
    if any("For" in name and not name.endswith("ForMaskedLM") for name in architectures):
        fail(f"is made for something else ({', '.join(architectures)}) than embeddings and scores")
    return "embedding"
