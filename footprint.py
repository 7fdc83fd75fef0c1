"""What a worker takes of the memory, estimated from the model's header before it is started."""

from dataclasses import dataclass

from engine.llama_limits import CELLS, DECODER_STEP, PLAIN_TOKENS
from engine.model_file import ModelFile
from engine.wire import WorkerSpec

MB = 1 << 20
# Measured on x86-64 Linux: an idle worker of each backend, with the libraries that it loads.
PROCESS_BYTES = {"llamacpp": 52 * MB, "mlx": 140 * MB, "flag": 550 * MB, "fake": 42 * MB}
VOCABULARY_BYTES = 450  # for each token: texts, ids by text, scores
# Encoders do without mlx-lm. Their tokenizer keeps XLM-R's pieces in a large trie.
ENCODER_BYTES, ENCODER_VOCABULARY_BYTES = {"mlx": 55 * MB, "onnx": 70 * MB}, 1200
ROWS = 12  # of a model's width that a token of a batch takes while it is computed


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes. Weights that are mapped from their file count: they are wanted in memory."""

    weights: int
    kv: int  # cells, and states
    compute: int  # of a batch
    process: int  # interpreter, libraries, vocabulary
    lanes: int  # cells apart, from when several are answered at once
    prefix_cache: int  # the most that prompts seen before may take as time goes by

    @property
    def loaded(self) -> int:
        """What it has when it has answered its first request."""
        return self.weights + self.kv + self.compute + self.process

    @property
    def most(self) -> int:
        return self.loaded + self.lanes + self.prefix_cache


def estimate(spec: WorkerSpec, model: ModelFile) -> Footprint:
    """What a worker with this model will take, on the CPU."""
    process = PROCESS_BYTES.get(spec.backend, 0)
    if spec.backend == "fake":
        return Footprint(0, 0, 0, process, 0, 0)
    per_token = VOCABULARY_BYTES
    if spec.backend in ENCODER_BYTES and spec.encoder is not None:
        process, per_token = ENCODER_BYTES[spec.backend], ENCODER_VOCABULARY_BYTES
    process += per_token * model.n_vocab
    n_tokens = spec.n_batch if spec.encoder is None else spec.encoder.batch_tokens
    compute = n_tokens * model.n_embd * 4 * ROWS
    if spec.encoder is not None:
        kv = 0
        if spec.backend == "llamacpp" and model.kv_bytes_per_token:  # a decoder
            n_most = max(spec.n_ctx, n_tokens)
            kv = -(-n_most // CELLS) * CELLS * model.kv_bytes_per_token
            # logits of every token of a call, where they are computed and where they are kept
            compute += 2 * min(DECODER_STEP, n_most) * model.n_vocab * 4
        return Footprint(model.size_bytes, kv, compute, process, 0, 0)
    outputs = spec.n_parallel * model.n_vocab * 4
    n_cells = -(-spec.kv_tokens // CELLS) * CELLS
    kv = n_cells * model.kv_bytes_per_token + spec.n_parallel * model.state_bytes
    lanes = 0
    if spec.lane_tokens:  # one more to copy through
        lanes = (spec.n_parallel + 1) * spec.lane_tokens * model.kv_bytes_per_token
        lanes += min(n_tokens, PLAIN_TOKENS) * model.n_embd * 4 * ROWS + outputs
    if spec.backend == "llamacpp" and not spec.flash_attention:
        # scores of each head, in F32 and for one product in F16, and the mask
        n_rows = min(n_tokens, max(PLAIN_TOKENS, spec.n_parallel + 1))
        compute += n_rows * n_cells * (6 * model.n_head + 4)
        lanes += n_rows * spec.lane_tokens * (6 * model.n_head + 4)
    compute += outputs
    return Footprint(model.size_bytes, kv, compute, process, lanes, spec.prefix_cache_bytes)
