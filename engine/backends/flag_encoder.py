"""Encoders and cross-encoders out of Hugging Face directories, through FlagEmbedding on torch.

Only the parts of its objects are used, the tokenizer and the model: its own `encode` computes the
first batch twice and tokenises pairs otherwise than the models were trained (transformers 5), and
in place of heads and weights that are missing it makes random ones. Heads are read and used as
everywhere, and without all weights nothing is loaded.
"""

import logging
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from engine.backends.base import (
    QUIET,
    Encoder,
    Floats,
    ReportProgress,
    Specials,
    first_line,
    importing,
)
from engine.backends.bert_folder import check_weights
from engine.backends.hf_tokenizer import FolderTokenizer
from engine.backends.padded import Inputs, PaddedEncoder
from engine.model_file import ModelFile
from engine.model_folder import read_model_folder
from engine.wire import WorkerSpec
from errors import ModelLoadFailed

logger = logging.getLogger("worker.flag")


def load(spec: WorkerSpec, progress: ReportProgress) -> Encoder:
    return FlagEncoder(spec, progress)


class FlagEncoder(PaddedEncoder):
    def __init__(self, spec: WorkerSpec, progress: ReportProgress) -> None:
        facts = read_model_folder(Path(spec.model_path))
        super().__init__(spec, facts)
        ranks = self.scale is not None
        check_weights(facts, ranks=ranks)
        progress(0.0)
        os.environ.update(QUIET)
        with importing("flag", "FlagEmbedding and torch"):
            self._torch, flag = import_module("torch"), import_module("FlagEmbedding")
        progress(0.5)
        self._torch.set_num_threads(spec.n_threads)
        has_gpu = spec.n_gpu_layers != 0 and self._torch.cuda.is_available()
        self._device = "cuda:0" if has_gpu else "cpu"
        loaded = _loaded(flag.FlagReranker if ranks else flag.BGEM3FlagModel, facts, self._device)
        tokenizer = loaded.tokenizer
        self.tokenizer = FolderTokenizer(
            tokenizer.backend_tokenizer,
            facts.n_vocab,
            begin=tokenizer.cls_token_id,
            unknown=tokenizer.unk_token_id,
            controls=tokenizer.all_special_ids,
        )
        self.specials = _specials(tokenizer, is_bert=facts.architecture == "bert")
        self.padding = tokenizer.pad_token_id
        model = loaded.model if ranks else loaded.model.model  # without FlagEmbedding's heads
        # halves on a CPU would be rounded weights, and slow
        self._model = (model.half() if has_gpu else model.float()).to(self._device).eval()
        for layer in self._model.base_model.encoder.layer:
            layer.register_forward_pre_hook(lambda *_: self.ask())
        progress(1.0)

    def compute(self, inputs: Inputs) -> Floats:
        named = {"input_ids": inputs.ids, "attention_mask": inputs.mask}
        if inputs.types is not None:
            named["token_type_ids"] = inputs.types
        with self._torch.inference_mode():
            out = self._model(
                **{name: self._torch.from_numpy(v).to(self._device) for name, v in named.items()}
            )
            values = out.last_hidden_state if self.scale is None else out.logits
            rows: Floats = values.float().cpu().numpy()
        return rows

    def close(self) -> None:
        self._model = None


def _loaded(flag_class: Any, facts: ModelFile, device: str) -> Any:
    try:
        return flag_class(str(facts.path), use_fp16=device != "cpu", devices=device)
    except MemoryError:
        raise
    except Exception as error:  # whatever there is in transformers, tokenizers, safetensors, torch
        logger.warning("%s cannot be loaded", facts.name, exc_info=error)
        reason = first_line(error).replace(str(facts.path), facts.name)
        raise ModelLoadFailed(f"FlagEmbedding cannot load {facts.name}: {reason}") from error


def _specials(tokenizer: Any, *, is_bert: bool) -> Specials:
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    unused = (begin, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    between = (end,) if is_bert else (end, end)
    return Specials(begin, end, between, frozenset(t for t in unused if t is not None))
