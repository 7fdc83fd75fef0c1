"""Encoders and cross-encoders out of Hugging Face directories, through mlx.

Everything is float32: that is exact for the weights as they are published, and a CPU is slow with
less. One thread calls mlx.
"""

import threading
from importlib import import_module
from pathlib import Path

import numpy as np

from engine.backends.base import Encoder, Floats, ReportProgress, importing
from engine.backends.bert_folder import read_shape, read_tokenizer, read_weights
from engine.backends.padded import Inputs, PaddedEncoder
from engine.model_folder import read_model_folder
from engine.wire import WorkerSpec

CACHE_BYTES = 256 << 20  # of memory that mlx keeps for arrays to come


def load(spec: WorkerSpec, progress: ReportProgress) -> Encoder:
    return MlxEncoder(spec, progress)


class MlxEncoder(PaddedEncoder):
    def __init__(self, spec: WorkerSpec, progress: ReportProgress) -> None:
        facts = read_model_folder(Path(spec.model_path))
        super().__init__(spec, facts)
        progress(0.0)
        with importing("mlx", "mlx and tokenizers"):
            self._mx, tokenizers = import_module("mlx.core"), import_module("tokenizers")
            bert = import_module("engine.backends.mlx_bert")
        shape = read_shape(facts, ranks=self.scale is not None)
        self.tokenizer, self.specials, self.padding = read_tokenizer(facts, tokenizers)
        tensors = read_weights(facts, shape)
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
