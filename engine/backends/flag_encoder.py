"""Encoders and cross-encoders out of Hugging Face directories, through FlagEmbedding on torch.

Only the parts of its objects are used, the tokenizer and the model: its own `encode` computes the
first batch twice and tokenises pairs otherwise than the models were trained (transformers 5), and
in place of heads that are missing it makes random ones. Heads are read and used as everywhere.
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from engine.backends.base import (
    Encoder,
    Floats,
    Ids,
    Interrupted,
    ReportProgress,
    Specials,
    Tokenizer,
)
from engine.heads import Heads, missing_heads, read_heads
from engine.model_file import ModelFile
from engine.model_folder import pooling_in, read_model_folder
from engine.types import Pooling, Scale
from engine.wire import EncoderSpec, WorkerSpec
from errors import ModelLoadFailed

logger = logging.getLogger("worker.flag")

INSTALL = "`./setup.sh --flag`, or `pip install -r requirements-flag.txt`"
MAX_SEQUENCES = 64  # of a batch
CALL_TOKENS = 20  # so many could be computed in the time that a call takes beside its tokens
_QUIET = {
    "HF_HUB_OFFLINE": "1",  # what is not in the directory is not fetched either
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def load(spec: WorkerSpec, progress: ReportProgress) -> Encoder:
    return FlagEncoder(spec, progress)


class FolderTokenizer:
    """The tokenizer of a directory, without the tokens around texts, which are in `Specials`."""

    def __init__(self, tokenizer: Any, n_vocab: int) -> None:
        self.n_vocab = n_vocab
        self.bos: int | None = tokenizer.cls_token_id
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._is_wordpiece = type(self._backend.model).__name__ == "WordPiece"
        self._specials = frozenset(tokenizer.all_special_ids)
        self._lock = threading.Lock()  # what is special is a state of the tokenizer

    def tokenize(self, text: str, *, parse_special: bool, continues: bool) -> list[int]:
        whole = text.encode("utf-8", "replace").decode()  # it takes no half of a surrogate pair
        with self._lock:
            self._backend.encode_special_tokens = not parse_special
            return list(self._backend.encode(whole, add_special_tokens=False).ids)

    def piece(self, token: int) -> bytes:
        return b"" if token in self._specials else self.literal(token)

    def literal(self, token: int) -> bytes:
        text: str = self._backend.id_to_token(token) or ""
        if token not in self._specials:
            if self._is_wordpiece:
                text = text[2:] if text.startswith("##") else f" {text}"
            text = text.replace("▁", " ")
        return text.encode()

    def ends_generation(self, token: int) -> bool:
        return False


class FlagEncoder:
    """Implements `engine.backends.base.Encoder`."""

    template: str | None = None

    def __init__(self, spec: WorkerSpec, progress: ReportProgress) -> None:
        assert spec.encoder is not None
        facts = read_model_folder(Path(spec.model_path))
        ranks = spec.encoder.kind == "reranker"
        self.heads, self.missing_heads = (None, ()) if ranks else _heads(facts, spec.encoder)
        self.n_embd = facts.n_embd
        self.n_ctx = min(spec.n_ctx, facts.n_ctx_train)
        self.n_tokens = max(self.n_ctx, spec.encoder.batch_tokens)
        self.n_sequences = MAX_SEQUENCES
        self.pooling: Pooling | None = pooling_in(facts.path)
        self.scale: Scale | None = "logit" if ranks else None
        progress(0.0)
        self._torch, flag = _libraries()
        progress(0.5)
        self._torch.set_num_threads(spec.n_threads)
        has_gpu = spec.n_gpu_layers != 0 and self._torch.cuda.is_available()
        self._device = "cuda:0" if has_gpu else "cpu"
        loaded = _loaded(flag.FlagReranker if ranks else flag.BGEM3FlagModel, facts, self._device)
        tokenizer = loaded.tokenizer
        self.tokenizer: Tokenizer = FolderTokenizer(tokenizer, facts.n_vocab)
        self.specials = _specials(tokenizer, is_bert=facts.architecture == "bert")
        self._padding: int = tokenizer.pad_token_id
        # BERT was trained to tell a query from a document by a type; XLM-R has only one
        self._has_types = ranks and facts.architecture == "bert"
        model = loaded.model if ranks else loaded.model.model  # without FlagEmbedding's heads
        # halves on a CPU would be rounded weights, and slow
        self._model = (model.half() if has_gpu else model.float()).to(self._device).eval()
        self._go_on: Callable[[], bool] = lambda: True
        for layer in self._model.base_model.encoder.layer:
            layer.register_forward_pre_hook(self._ask)
        progress(1.0)

    def encode(self, batch: Sequence[Ids], go_on: Callable[[], bool] = lambda: True) -> Floats:
        self._check(batch)
        self._go_on = go_on
        lengths = [len(ids) for ids in batch]
        ends = np.cumsum(lengths)
        size = (len(batch),) if self.scale is not None else (int(ends[-1]), self.n_embd)
        found = np.empty(size, np.float32)
        for group in groups(lengths):
            values = self._call([batch[i] for i in group])
            for i, of_sequence in zip(group, values, strict=True):
                if self.scale is not None:
                    found[i] = of_sequence[0]
                else:
                    found[ends[i] - lengths[i] : ends[i]] = of_sequence[: lengths[i]]
        return found

    def _call(self, group: Sequence[Ids]) -> Floats:
        """Rows [n_sequences, longest, n_embd], or scores [n_sequences, 1]."""
        longest = max(map(len, group))
        ids = np.full((len(group), longest), self._padding, np.int64)
        mask = np.zeros((len(group), longest), np.int64)
        for row, sequence in enumerate(group):
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._has_types:
            is_border = ids == self.specials.end
            inputs["token_type_ids"] = (np.cumsum(is_border, axis=1) - is_border > 0) * mask
        with self._torch.inference_mode():
            out = self._model(
                **{name: self._torch.from_numpy(v).to(self._device) for name, v in inputs.items()}
            )
            values = out.last_hidden_state if self.scale is None else out.logits
            rows: Floats = values.float().cpu().numpy()
        return rows

    def _check(self, batch: Sequence[Ids]) -> None:
        """Raises ValueError. On a GPU an id that is not there would end the process."""
        if not 0 < len(batch) <= self.n_sequences:
            raise ValueError(f"a batch of {len(batch)} sequences, not of 1 to {self.n_sequences}")
        if (n_tokens := sum(map(len, batch))) > self.n_tokens:
            raise ValueError(f"a batch of {n_tokens} tokens, more than {self.n_tokens}")
        for ids in batch:
            if not 0 < len(ids) <= self.n_ctx:
                raise ValueError(f"a sequence of {len(ids)} tokens, not of 1 to {self.n_ctx}")
            if min(ids) < 0 or max(ids) >= self.tokenizer.n_vocab:
                raise ValueError(f"token ids that are not from 0 to {self.tokenizer.n_vocab - 1}")

    def _ask(self, *_: Any) -> None:
        """Before each layer."""
        if not self._go_on():
            raise Interrupted

    def close(self) -> None:
        self._model = None


def groups(lengths: Sequence[int]) -> list[list[int]]:
    """Which sequences go into one call, each padded to the longest of its call. The cheapest way
    to cut the sequences, sorted by length, where a call costs CALL_TOKENS beside its tokens."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    costs, starts = [0], [0]  # of the first n sequences; where their last call begins
    for n in range(1, len(order) + 1):
        cost, start = min(
            (costs[k] + CALL_TOKENS + (n - k) * lengths[order[k]], k) for k in range(n)
        )
        costs.append(cost)
        starts.append(start)
    cuts = [len(order)]
    while cuts[-1]:
        cuts.append(starts[cuts[-1]])
    return [order[start:end] for start, end in pairwise(reversed(cuts))]


def _libraries() -> tuple[Any, Any]:
    os.environ.update(_QUIET)  # they look at it when they are imported
    try:
        return import_module("torch"), import_module("FlagEmbedding")
    except (ImportError, OSError) as error:
        raise ModelLoadFailed(
            f"The backend flag needs FlagEmbedding and torch ({_first_line(error)}): run {INSTALL}."
        ) from error


def _loaded(flag_class: Any, facts: ModelFile, device: str) -> Any:
    try:
        return flag_class(str(facts.path), use_fp16=device != "cpu", devices=device)
    except MemoryError:
        raise
    except Exception as error:  # whatever there is in transformers, tokenizers, safetensors, torch
        logger.warning("%s cannot be loaded", facts.name, exc_info=error)
        reason = _first_line(error).replace(str(facts.path), facts.name)
        raise ModelLoadFailed(f"FlagEmbedding cannot load {facts.name}: {reason}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def _heads(facts: ModelFile, encoder: EncoderSpec) -> tuple[Heads | None, tuple[str, ...]]:
    sparse = Path(encoder.sparse_head_path) if encoder.sparse_head_path else None
    colbert = Path(encoder.colbert_head_path) if encoder.colbert_head_path else None
    heads = read_heads(facts.path, facts.n_embd, sparse, colbert)
    return heads, missing_heads(facts.path, sparse, colbert) if heads is None else ()


def _specials(tokenizer: Any, *, is_bert: bool) -> Specials:
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    unused = (begin, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    between = (end,) if is_bert else (end, end)
    return Specials(begin, end, between, frozenset(t for t in unused if t is not None))
