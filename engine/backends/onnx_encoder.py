"""Encoders and cross-encoders out of Hugging Face directories, through ONNX Runtime on the CPU.

Everything is float32. A call runs in a thread of its own, so that the one that waits can ask
whether anybody still wants it.
"""

from concurrent.futures import ThreadPoolExecutor, wait
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from engine.backends.base import Encoder, Floats, ReportProgress
from engine.backends.bert_folder import read_shape, read_tokenizer, read_weights
from engine.backends.padded import Inputs, PaddedEncoder
from engine.model_folder import read_model_folder
from engine.wire import WorkerSpec
from errors import ModelLoadFailed

INSTALL = "`./setup.sh --onnx`, or `pip install -r requirements-onnx.txt`"
ASK_EVERY_S = 0.05
# Its threads would wait in a loop for the next operation, also between two calls: as long as other
# programs want the cores they take turns with them.
_OPTIONS = {"session.intra_op.allow_spinning": "1"}


def load(spec: WorkerSpec, progress: ReportProgress) -> Encoder:
    return OnnxEncoder(spec, progress)


class OnnxEncoder(PaddedEncoder):
    def __init__(self, spec: WorkerSpec, progress: ReportProgress) -> None:
        facts = read_model_folder(Path(spec.model_path))
        super().__init__(spec, facts)
        progress(0.0)
        self._runtime, bert, tokenizers = _libraries()
        shape = read_shape(facts, ranks=self.scale is not None)
        self.tokenizer, self.specials, self.padding = read_tokenizer(facts, tokenizers)
        weights = read_weights(facts, shape)
        progress(0.5)
        model = bert.model_of(shape, has_types=self.has_types)
        self._session = self._open(model.SerializeToString(), weights, spec.n_threads)
        self._thread = ThreadPoolExecutor(1, "onnx")
        progress(1.0)

    def _open(self, model: bytes, weights: dict[str, Floats], n_threads: int) -> Any:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = n_threads
        options.enable_mem_pattern = False  # one would be kept for each shape of a call
        options.log_severity_level = 3
        for name, value in _OPTIONS.items():
            options.add_session_config_entry(name, value)
        value = self._runtime.OrtValue.ortvalue_from_numpy
        values = [value(np.ascontiguousarray(tensor)) for tensor in weights.values()]
        options.add_external_initializers(list(weights), values)
        return self._runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def compute(self, inputs: Inputs) -> Floats:
        self.ask()
        lengths = inputs.mask.sum(axis=1, dtype=np.int32)
        is_padded = np.array(bool(lengths.min() < inputs.ids.shape[1]))
        feed = {"ids": inputs.ids, "lengths": lengths, "is_padded": is_padded}
        if self.has_types:
            feed["types"] = np.zeros_like(inputs.ids) if inputs.types is None else inputs.types
        options = self._runtime.RunOptions()
        call = self._thread.submit(self._session.run, None, feed, options)
        try:
            while not wait([call], ASK_EVERY_S).done:
                self.ask()
        except BaseException:
            options.terminate = True  # ends it between two operations
            wait([call])
            raise
        found: Floats = call.result()[0]
        return found

    def close(self) -> None:
        self._thread.shutdown()
        self._session = None


def _libraries() -> tuple[Any, Any, Any]:
    try:
        runtime, tokenizers = import_module("onnxruntime"), import_module("tokenizers")
        return runtime, import_module("engine.backends.onnx_bert"), tokenizers
    except ImportError as error:
        raise ModelLoadFailed(
            f"The backend onnx needs onnxruntime, onnx and tokenizers ({error}): run {INSTALL}."
        ) from error
