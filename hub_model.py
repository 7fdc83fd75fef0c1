"""A model as a path names it on the Hugging Face hub, and which files of its repo are meant.

Plain decisions about names: nobody is asked, and nothing is read.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from engine.file_names import HEAD_FILES, HEADS, TOOL_TEMPLATE, WEIGHTS
from errors import ModelLoadFailed

FOLDER_BACKENDS = frozenset({"mlx", "onnx", "flag"})  # whose models are directories
# Which GGUF is taken of several, where nobody says: the best that most machines can hold first.
QUANTS = ("Q4_K_M", "Q5_K_M", "Q4_K_S", "Q6_K", "Q8_0", "Q4_0", "MXFP4", "F16", "BF16", "F32")
MOST_LISTED = 20  # files in a message

_PREFIX = "hf:"
_NAME = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_MODEL = re.compile(
    rf"hf:(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>\w[\w.-]*(?:/\w[\w.-]*)*))?(?::(?P<what>[^:\\]+))?",
    re.ASCII,
)
_PART = re.compile(r"(?P<stem>.+)-(?P<n>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.txt")
_IN_FOLDER = ("*.json", "*.jinja", "merges.txt", *_TOKENIZERS, *HEADS)
_POOLING = "1_Pooling/config.json"


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model as a path names it: `hf:owner/repo[@revision][:file or quant]`."""

    repo: str
    what: str | None = None  # a file's name, or a quant such as Q4_K_M
    revision: str | None = None  # a branch, tag or commit; None: main


def parse(text: str) -> HubModel | None:
    """The model on the hub that a path names; None: it is an ordinary path. Raises ValueError with
    a sentence for one that is meant so and cannot be."""
    if not text.startswith(_PREFIX):
        return None
    match = _MODEL.fullmatch(text)
    repo, what = (match["repo"], match["what"]) if match else ("", None)
    is_odd = "--" in repo or ".." in repo or repo.endswith(".git") or len(repo) > 96
    if not match or is_odd or not is_inside(what or "file"):
        raise ValueError(
            "a model on the Hugging Face hub is written hf:owner/repo, hf:owner/repo:Q4_K_M or "
            "hf:owner/repo:file.gguf, with @revision after the repo where it is not main"
        )
    return HubModel(repo, what, match["revision"])


def pick(model: HubModel, backend: str, names: Collection[str]) -> list[str]:
    """The files of a model among those of its repo, first the one that it is called by.

    For a backend whose models are directories, all that such a directory needs, config.json first.
    Else one GGUF:

    1. The file of that name, with or without its folder.
    2. The only one that has the quant as a word in its name, whatever its case.
    3. Where nothing is said: the only GGUF, or the only one of the first of QUANTS that is there.

    With it come the other parts of a split model, and heads that lie beside it. Projectors of
    images, importance matrices and later parts are not taken for models.

    Raises ModelLoadFailed that lists what there is.
    """
    return _folder(model, backend, names) if backend in FOLDER_BACKENDS else _gguf(model, names)


def _gguf(model: HubModel, names: Collection[str]) -> list[str]:
    models = sorted(name for name in names if _is_model(name))
    if not models:
        raise ModelLoadFailed(
            f"{model.repo} has no GGUF model on the hub ({_listed(names)}); give a repo that has "
            "one, or set BACKEND=mlx, or onnx or flag for an encoder, to take it as a directory."
        )
    found = _named(model.what, models)
    if len(found) != 1:
        number = "several" if found else "no"
        named = f" named '{model.what}'" if model.what else ""
        raise ModelLoadFailed(
            f"{model.repo} has {number} models{named} on the hub: {_listed(found or models)}. "
            f"Name one, such as hf:{model.repo}:{(found or models)[0]}."
        )
    (name,) = found
    folder = name.rpartition("/")[0]
    beside = [
        other for other in sorted(names)
        if other.rpartition("/")[0] == folder and HEAD_FILES.fullmatch(_base(other))
    ]  # fmt: skip
    return [*_whole(model, [name], names), *beside]


def _named(what: str | None, models: list[str]) -> list[str]:
    if what is None:
        if len(models) == 1:
            return models
        of_quants = ([name for name in models if _has_word(name, quant)] for quant in QUANTS)
        return next(filter(None, of_quants), models)
    if what in models:
        return [what]
    if what.lower().endswith(".gguf"):
        return [name for name in models if _base(name) == what]
    return [name for name in models if _has_word(name, what)]


def _is_model(name: str) -> bool:
    base = _base(name).lower()
    part = _PART.fullmatch(base)
    return (
        base.endswith(".gguf")
        and "mmproj" not in base
        and not base.startswith("imatrix")
        and not base.endswith("imatrix.gguf")
        and (part is None or int(part["n"]) == 1)
    )


def _has_word(name: str, word: str) -> bool:
    """Q4_K is no word of Q4_K_M, nor Q4_XS of IQ4_XS; what stands before may end in a `_`."""
    pattern = rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9_])"
    return re.search(pattern, name[: -len(".gguf")], re.IGNORECASE) is not None


def _folder(model: HubModel, backend: str, names: Collection[str]) -> list[str]:
    if model.what is not None:
        raise ModelLoadFailed(
            f"This backend takes a whole repo: write hf:{model.repo}, without ':{model.what}'."
        )
    root = sorted(name for name in names if "/" not in name)
    weights = next(
        (found for pattern in WEIGHTS if (found := [n for n in root if _fits(n, [pattern])])), []
    )
    rest = [name for name in root if _fits(name, _IN_FOLDER)]
    # only transformers, which comes with flag, reads the others
    tokenizers = _TOKENIZERS if backend == "flag" else _TOKENIZERS[:1]
    has_tokenizer = any(_fits(name, tokenizers) for name in rest)
    if "config.json" not in rest or not weights or not has_tokenizer:
        raise ModelLoadFailed(
            f"{model.repo} is no model directory for the backend {backend}: it wants config.json, "
            f"{' or '.join(tokenizers)} and model.safetensors, and has {_listed(names)}. Give "
            "another repo, or for a GGUF set BACKEND=llamacpp."
        )
    rest.remove("config.json")
    inner = [name for name in (_POOLING, TOOL_TEMPLATE) if name in names]
    return ["config.json", *rest, *inner, *_whole(model, weights, names)]


def _whole(model: HubModel, some: list[str], names: Collection[str]) -> list[str]:
    """These files, with all parts of those that are split."""
    whole = list(dict.fromkeys(part for name in some for part in _parts(name)))
    for name in whole:
        if name not in names:
            raise ModelLoadFailed(
                f"{model.repo} on the hub lacks {name}, a part of {some[0]}; give another file."
            )
    return whole


def _parts(name: str) -> Iterator[str]:
    part = _PART.fullmatch(name)
    if part is None:
        yield name
    else:
        for n in range(1, int(part["count"]) + 1):
            yield f"{part['stem']}-{n:05}-of-{part['count']}{part['suffix']}"


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_inside(name: str) -> bool:
    """Whether a name stays in the folder that it is put into."""
    return not any(part in ("", ".", "..") for part in name.split("/")) and "\\" not in name


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:MOST_LISTED]) or "nothing"
    more = len(names) - MOST_LISTED
    return f"{shown} and {more} more" if more > 0 else shown
