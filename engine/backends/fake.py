"""A model without weights: deterministic, scripted, as slow and as faulty as you like.

`LIGHT_BACKEND=fake` is all it takes to try a client without a model. `LIGHT_MODEL_PATH` may name a
JSON file with a script; every key is optional:

    {"load_s": 0, "step_ms": 0, "token_us": 0, "guesses": false, "fault": "load",
     "template": "{{ messages … }}",
     "rules": [{"match": "weather", "answer": "It rains."},
               {"match": "poison", "fault": "crash"}]}

The first rule whose `match` occurs in the last user turn (the whole prompt of a raw completion)
decides; of a list of answers the seed chooses. Without a rule the answer is `You said: …`. The
longer an answer, the higher the log probability of its tokens; that of a prompt's token is lower
the greater the token before it.

A rule's `fault` happens in the first step that decodes the prompt's end, or after `after` bytes of
the answer: `step` raises, `crash` kills the process, `hang` never returns. For encoders there are
`heads` and more faults: see `fake_encoder.py`.

What it answers is read back from the cells that the scheduler filled, so a mistake in slots,
positions or prefixes shows as a wrong answer.
"""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from engine.backends.base import CacheFull, Constraint, Engine, Memory, ReportProgress, Tokenizer
from engine.batch_engine import BatchEngine
from engine.model_file import Kind, ModelFile
from engine.prefix import Saved
from engine.types import Batch, Chunk, Sampled, SamplingParams, Sequence
from engine.wire import WorkerSpec
from errors import ModelLoadFailed

CONTROL_TOKENS = (
    "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>",
    "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
N_CTX_TRAIN = 32768
N_EMBD = 32  # of an encoder
_END, _USER = 256, 258
_CONTROL = re.compile(f"({'|'.join(map(re.escape, CONTROL_TOKENS))})")
_CONTROL_IDS = {literal: [256 + number] for number, literal in enumerate(CONTROL_TOKENS)}


class Rule(msgspec.Struct, forbid_unknown_fields=True):
    match: str = ""
    answer: str | list[str] | None = None
    fault: Literal["step", "crash", "hang", "stall", "nan", "nan_in_company"] | None = None
    after: int = 0


class Script(msgspec.Struct, forbid_unknown_fields=True):
    load_s: float = 0
    step_ms: float = 0  # time of a step
    token_us: float = 0  # and of each token in it
    guesses: bool = False  # tokens, where the tier does: then a step may give more than one
    fault: Literal["load", "load_crash"] | None = None
    template: str | None = None  # of chats, instead of CHAT_TEMPLATE
    rules: list[Rule] = []
    heads: bool = True  # of an embedding model: for sparse and ColBERT vectors

    @classmethod
    def read(cls, path: str) -> "Script":
        if not path:
            return cls()
        try:
            return msgspec.json.decode(Path(path).read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError) as error:
            raise ModelLoadFailed(
                f"The fake backend cannot read the script {Path(path).name}: {error}"
            ) from error

    def rule(self, text: str) -> Rule:
        return next((rule for rule in self.rules if rule.match in text), Rule())


def model_file(script: Path | Literal[""], kind: Kind = "chat") -> ModelFile:
    """What a header would say. Raises ModelLoadFailed where the script cannot be read."""
    template = Script.read(str(script)).template
    return ModelFile(
        path=Path(script or "fake"),
        size_bytes=0,
        architecture="fake",
        name="fake",
        n_ctx_train=N_CTX_TRAIN,
        n_layer=0,
        n_embd=0 if kind == "chat" else N_EMBD,
        n_vocab=FakeTokenizer.n_vocab,
        max_token_bytes=max(map(len, CONTROL_TOKENS)),
        kv_bytes_per_token=0,
        chat_template=CHAT_TEMPLATE if template is None else template,
        bos_token="",
        eos_token=CONTROL_TOKENS[0],
        add_bos=False,
        control_tokens=CONTROL_TOKENS,
        kind=kind,
    )


def load(spec: WorkerSpec, progress: ReportProgress) -> Engine:
    script = Script.read(spec.model_path)
    begin_load(script, progress)
    return BatchEngine(
        FakeDecoder(script, n_slots=spec.n_parallel, n_cells=spec.kv_tokens),
        msgspec.structs.replace(spec, speculates=spec.speculates and script.guesses),
        n_ctx=min(spec.n_ctx, spec.kv_tokens, N_CTX_TRAIN),
        n_cells=spec.kv_tokens,
        n_batch=spec.n_batch,
    )


def begin_load(script: Script, progress: ReportProgress) -> None:
    """What a load does before there is a model, in its time; or its fault."""
    progress(0.0)
    time.sleep(script.load_s)
    if script.fault == "load":
        raise ModelLoadFailed("The fake backend was told to fail.")
    if script.fault == "load_crash":
        os.kill(os.getpid(), signal.SIGKILL)
    progress(1.0)


class FakeTokenizer:
    """Bytes are tokens 0…255, control tokens follow."""

    n_vocab = 256 + len(CONTROL_TOKENS)
    bos: int | None = None

    def tokenize(self, text: str, *, parse_special: bool, continues: bool) -> list[int]:
        if not parse_special:
            return list(text.encode())
        ids: list[int] = []
        for part in _CONTROL.split(text):
            ids += _CONTROL_IDS.get(part) or part.encode()
        return ids

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def literal(self, token: int) -> bytes:
        return self.piece(token) or CONTROL_TOKENS[token - 256].encode()

    def ends_generation(self, token: int) -> bool:
        return token == _END


class FakeDecoder:
    """Implements `engine.backends.base.Decoder`, and is its own `Memory`. A cell is a list with its
    token, since slots may share it."""

    is_cells, takes_back, can_mark, shares_cells, block = True, True, False, True, 256

    def __init__(
        self,
        script: Script,
        *,
        n_slots: int,
        n_cells: int,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.tokenizer: Tokenizer = FakeTokenizer()
        self.memory: Memory = self
        self.cells: list[list[list[int]]] = [[] for _ in range(n_slots)]
        self._before: list[int] = []  # the token of each wanted row
        self._script = script
        self._n_cells = n_cells
        self._sleep = sleep

    def truncate(self, slot: int, n_tokens: int) -> bool:
        del self.cells[slot][n_tokens:]
        return True

    def share(self, source: int, slot: int, n_tokens: int) -> None:
        self.cells[slot] = self.cells[source][:n_tokens]

    def save(self, slot: int, start: int, end: int) -> Saved:
        return np.array(self.tokens(slot)[start:end], np.int32)

    def load(self, slot: int, saved: Any, start: int, end: int) -> bool:
        if not self._has_room(len(saved)):
            raise ValueError("there is no room for what was saved")
        self.cells[slot] += [[int(token)] for token in saved[: end - start]]
        return True

    def mark(self, slot: int, max_bytes: int, *, is_whole: bool = False) -> Saved | None:
        return None  # its cells can be cut anywhere

    def rewind(self, slot: int, saved: Any, n_tokens: int) -> bool:
        return False

    def clear(self, slot: int) -> None:
        self.cells[slot] = []

    def tokens(self, slot: int) -> list[int]:
        return [token for (token,) in self.cells[slot]]

    def _has_room(self, n_tokens: int) -> bool:
        if sum(map(len, self.cells)) + n_tokens <= self._n_cells:  # shared ones count too often
            return True
        n_used = len({id(cell) for cells in self.cells for cell in cells})
        return n_used + n_tokens <= self._n_cells

    def sampler(self, sampling: SamplingParams, prompt: list[int]) -> SamplingParams:
        return sampling

    def decode(self, batch: Batch) -> None:
        if not self._has_room(batch.n_tokens):
            raise CacheFull
        for chunk in batch.chunks:
            self._maybe_fault(chunk)
        self._sleep(self._script.step_ms / 1e3 + self._script.token_us / 1e6 * batch.n_tokens)
        self._before = []
        for chunk in batch.chunks:
            cells = self.cells[chunk.slot]
            if len(cells) != chunk.start:
                raise ValueError(f"slot {chunk.slot} has {len(cells)} cells, not {chunk.start}")
            cells += [[token] for token in chunk.tokens]
            n_rows = chunk.n_wanted + len(chunk.guesses)
            self._before += [token for (token,) in cells[len(cells) - n_rows :]]

    def sample(self, row: int, sequence: Sequence) -> Sampled:
        assert sequence.slot is not None
        cells = self.tokens(sequence.slot)[: len(sequence.tokens)]  # guesses lie behind
        turn = _last_turn(cells[: sequence.n_prompt])
        answer = self._script.rule(turn).answer
        sampling: SamplingParams = sequence.sampler
        if isinstance(answer, list):  # the seed chooses
            answer = answer[sampling.seed % len(answer)]
        data = (f"You said: {turn}" if answer is None else answer).encode()
        n_done = len(cells) - sequence.n_prompt
        token = data[n_done] if n_done < len(data) else _END
        if token == _END and (sampling.ignore_eos or n_done < sampling.min_tokens):
            token = ord(".")
        if sequence.constraint:
            token = _allowed(sequence.constraint, token)
        if sampling.logit_bias.get(token, 0) <= -100:
            token = _END
        if sampling.n_logprobs is None:
            return Sampled(token)
        logprob = -1 / max(len(data), 1)
        others = [(i, logprob - i) for i in range(1, sampling.n_logprobs)]
        return Sampled(token, logprob, [(token, logprob), *others][: sampling.n_logprobs])

    def score(self, row: int, token: int, n_top: int) -> Sampled:
        logprob = -(1 + self._before[row]) / 256
        others = [(i, logprob - i) for i in range(1, n_top)]
        return Sampled(token, logprob, [(token, logprob), *others][:n_top])

    def close(self) -> None:
        pass

    def _maybe_fault(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        rule = self._script.rule(_last_turn(list(sequence.tokens[: sequence.n_prompt])))
        at = sequence.n_prompt + rule.after
        if rule.fault is None or not chunk.end <= at <= chunk.end + len(chunk.guesses):
            return
        if rule.fault == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if rule.fault == "hang":
            while True:
                time.sleep(3600)
        raise RuntimeError("the fake backend was told to fail this step")


def _allowed(constraint: Constraint, wanted: int) -> int:
    """The wanted token if the constraint allows it, or else one that is soon at the end."""
    logits = np.zeros(FakeTokenizer.n_vocab, np.float32)
    logits[[*b'"]}0']] = 1
    logits[_END], logits[wanted] = 2, 3
    constraint.apply(logits)
    token = int(logits.argmax())
    constraint.accept(token)
    return token


def _last_turn(prompt: list[int]) -> str:
    """The text of the last user turn, or of the whole prompt if it has no turns."""
    if _USER in prompt:
        prompt = prompt[len(prompt) - prompt[::-1].index(_USER) :]
        prompt = prompt[: prompt.index(_END)] if _END in prompt else prompt
    return bytes(t for t in prompt if t < 256).decode(errors="replace")
