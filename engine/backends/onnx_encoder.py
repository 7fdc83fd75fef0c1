"""Encoders and cross-encoders out of Hugging Face directories, through ONNX Runtime on the CPU.

Everything is float32. A call runs in a thread of its own, so that the one that waits can ask
whether anybody still wants it.
"""

from concurrent.futures import ThreadPoolExecutor, wait
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from engine.backends.base import Encoder, Floats, ReportProgress, importing
from engine.backends.bert_folder import read_shape, read_tokenizer, read_weights
from engine.backends.padded import Inputs, PaddedEncoder
from engine.model_folder import read_model_folder
from engine.wire import WorkerSpec

ASK_EVERY_S = 0.05
# Of padded sequences a layer's attention is in memory as a whole: 64 MB. Longer ones go alone.
ATTENTION_NUMBERS = 1 << 24


def load(spec: WorkerSpec, progress: ReportProgress) -> Encoder:
    return OnnxEncoder(spec, progress)


class OnnxEncoder(PaddedEncoder):
    def __init__(self, spec: WorkerSpec, progress: ReportProgress) -> None:
        facts = read_model_folder(Path(spec.model_path))
        super().__init__(spec, facts)
        assert spec.encoder is not None
        self._usual_tokens = spec.encoder.batch_tokens
        progress(0.0)
        with importing("onnx", "onnxruntime, onnx and tokenizers"):
            self._runtime, tokenizers = import_module("onnxruntime"), import_module("tokenizers")
            bert = import_module("engine.backends.onnx_bert")
        shape = read_shape(facts, ranks=self.scale is not None)
        self._n_head = shape.n_head
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
        # its threads would wait in loops: that gains nothing, and beside other programs costs half
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        value = self._runtime.OrtValue.ortvalue_from_numpy
        values = [value(np.ascontiguousarray(tensor)) for tensor in weights.values()]
        options.add_external_initializers(list(weights), values)
        return self._runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def compute(self, inputs: Inputs) -> Floats:
        ids, mask, types = inputs.ids, inputs.mask, inputs.types
        if mask.all() or ids.size * ids.shape[1] * self._n_head <= ATTENTION_NUMBERS:
            return self._call(inputs)
        shape = (len(ids), 1) if self.scale is not None else (*ids.shape, self.n_embd)
        found = np.zeros(shape, np.float32)
        for row, n in enumerate(mask.sum(axis=1).tolist()):
            of_row = slice(row, row + 1), slice(n)
            alone = Inputs(ids[of_row], mask[of_row], None if types is None else types[of_row])
            found[of_row if self.scale is None else of_row[:1]] = self._call(alone)
        return found

    def _call(self, inputs: Inputs) -> Floats:
        self.ask()
        feed = {
            "ids": inputs.ids,
            "lengths": inputs.mask.sum(axis=1, dtype=np.int32),
            "is_padded": np.array(not inputs.mask.all()),
        }
        if self.has_types:
            feed["types"] = np.zeros_like(inputs.ids) if inputs.types is None else inputs.types
        options = self._runtime.RunOptions()
        if inputs.ids.size > self._usual_tokens:  # what it took would be kept
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
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
