"""What guessed tokens save, on a real model: answers with them and without, taking turns.

    python -m bench.speculation models/SmolLM2-135M-Instruct.Q4_1.gguf --threads 1 --as q8_0
    python -m bench.speculation models/SmolLM2-135M-Instruct-mlx

1. Edits of code, where the answer repeats most of the prompt. What a small model would say is not
   an edit, so the answers are given: each token is computed and sampled as always, and then what
   stands in the edited text is put in its place.
2. The same prompts, and what the model itself says, greedy.
3. Texts at a high temperature, one at a time and four at once: nothing to be gained.

With `--plain` there is no flash attention (FLASH_ATTENTION=false). With `--as` the model's weights
are made such first: what a guess costs is up to the kernels. The prices of steps with several
tokens, in steps with one, are measured before all else. A directory is run by MLX, which chooses
its threads and its attention itself.

Ratios are of tokens/s by the clock and by the processor's time, which with one thread other
programs disturb less; medians over all answers. One line of JSON for each.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import llama_cpp as lib

from engine.backends.base import Engine, load_engine
from engine.backends.llamacpp import LlamaDecoder
from engine.backends.mlx import MlxEngine
from engine.backends.mlx_sampling import Chooser
from engine.batch_engine import BatchEngine
from engine.types import Batch, Sampled, SamplingParams, Sequence
from engine.wire import WorkerSpec

ROOT = Path(__file__).parent.parent
EDITS = (  # a file, its lines that are asked for, what is renamed, and to what
    ("engine/pace.py", 28, "n_decodes", "n_streams"),
    ("waiting.py", 30, "priority", "urgency"),
    ("engine/text.py", 32, "held", "kept"),
    ("engine/batcher.py", 30, "tokens", "pieces"),
)
TOPICS = ("the sea", "a lost letter", "winter in a small town", "the first railway")
GREEDY = SamplingParams(temperature=0, ignore_eos=True)
WILD = SamplingParams(temperature=1.2, top_k=0, top_p=1, min_p=0, ignore_eos=True)


class Runner:
    """An engine that answers, with guesses or without, and can be told what to say."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._n_admitted = 0
        self.n_guessed = self.n_right = 0

    def ids(self, text: str) -> list[int]:
        return self.engine.tokenizer.tokenize(text, parse_special=True, continues=True)

    def prices(self) -> dict[int, float]:
        """Of steps with so many tokens, in steps with one."""
        times: dict[int, list[float]] = {n: [] for n in (1, 2, 4, 8, 12, 16)}
        for n in [*times] * 5:
            times[n].append(self._compute(n))
        return {n: round(min(took) / min(times[1]), 2) for n, took in times.items()}

    def _compute(self, n_tokens: int) -> float:
        """Seconds of a step."""
        raise NotImplementedError

    def _follow(self, id: int, script: list[int]) -> None:
        """Have this said by the sequence that was just admitted, whatever it chooses."""
        raise NotImplementedError

    def answer(
        self,
        prompts: Sequence_[list[int]],
        n_tokens: int,
        sampling: SamplingParams,
        script: Sequence_[int] = (),
    ) -> tuple[float, float]:
        """Tokens/s of the answers past their first tokens: by the clock, by the processor's."""
        said: dict[int, int] = {}
        for prompt in prompts:
            self._n_admitted += 1
            said[self._n_admitted] = 0
            self.engine.admit(self._n_admitted, prompt, sampling)
            self._follow(self._n_admitted, list(script))
        while min(said.values()) == 0:
            for id, _ in self.engine.step().tokens:
                said[id] += 1
        n_before = sum(said.values())
        clock, processor = time.perf_counter(), time.process_time()
        while not self.engine.idle:
            result = self.engine.step()
            self.n_guessed += sum(n for _, n in result.guessed)
            self.n_right += len(result.right)
            for id, _ in result.tokens:
                said[id] += 1
                if said[id] == n_tokens:
                    self.engine.cancel(id)
        n = sum(said.values()) - n_before
        return n / (time.perf_counter() - clock), n / (time.process_time() - processor)


class LlamaRunner(Runner):
    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._decoder = cast(LlamaDecoder, cast(BatchEngine, engine)._decoder)
        self._sample = self._decoder.sample
        self._decoder.sample = self._say  # type: ignore[method-assign]
        self._script: list[int] = []

    def _compute(self, n_tokens: int) -> float:
        """By the processor's time."""
        batch = Batch()
        batch.add(Sequence(0, array("i", range(1000, 1001)), slot=0), 1)
        batch.guess(batch.chunks[0], array("i", range(1001, 1000 + n_tokens)))
        at = time.process_time()
        self._decoder.decode(batch)
        seconds = time.process_time() - at
        self._decoder.memory.clear(0)
        return seconds

    def _follow(self, id: int, script: list[int]) -> None:
        self._script = script

    def _say(self, row: int, sequence: Sequence) -> Sampled:
        sampled = self._sample(row, sequence)
        n_done = len(sequence.tokens) - sequence.n_prompt
        return Sampled(self._script[n_done]) if n_done < len(self._script) else sampled


class MlxRunner(Runner):
    def _compute(self, n_tokens: int) -> float:
        """By the clock: a GPU takes no time of the processor."""
        mx, engine = import_module("mlx.core"), cast(MlxEngine, self.engine)
        cache = import_module("mlx_lm.models.cache").make_prompt_cache(engine._model)
        at = time.perf_counter()
        mx.eval(engine._model(mx.array([[*range(1000, 1000 + n_tokens)]]), cache=cache))
        return time.perf_counter() - at

    def _follow(self, id: int, script: list[int]) -> None:
        (live,) = (live for live in cast(MlxEngine, self.engine)._waiting if live.id == id)
        if script:
            live.chooser = Scripted(live.chooser, script)


class Scripted:
    """Has a chooser choose, and then what is given."""

    processors: tuple[Callable[[Any, Any], Any], ...] = ()

    def __init__(self, chooser: Chooser, script: list[int]) -> None:
        self.sample: Callable[[Any], Any] = self._sample
        self._chooser = chooser
        self._left = script[::-1]

    def _sample(self, scores: Any) -> Any:
        chosen = self._chooser.sample(scores)
        return chosen * 0 + self._left.pop() if self._left else chosen

    def ahead(self, logits: Any, guesses: list[int]) -> list[int]:
        chosen = self._chooser.ahead(logits, guesses)
        if not self._left:
            return chosen
        said = []
        for guess in [*guesses, None]:
            said.append(self._left.pop() if self._left else 0)
            if said[-1] != guess:
                break
        return said

    def taken(self, token: int) -> Sampled:
        return Sampled(token)


def new_runner(model: str, n_threads: int, *, speculates: bool, flash_attention: bool) -> Runner:
    is_mlx = Path(model).is_dir()
    spec = WorkerSpec(
        name="bench", backend="mlx" if is_mlx else "llamacpp", model_path=model, n_ctx=4096,
        n_parallel=4, kv_tokens=8192, n_batch=512, n_threads=n_threads, n_gpu_layers=-1,
        max_stall_s=0.2, prefix_cache_bytes=1 << 28, speculates=speculates,
        flash_attention=flash_attention,
    )  # fmt: skip
    engine = load_engine(spec, lambda _: None)
    return MlxRunner(engine) if is_mlx else LlamaRunner(engine)


def as_type(model: str, name: str, path: Path) -> str:
    """A model whose weights are of another type, made of those of this one."""
    params = lib.llama_model_quantize_default_params()
    params.allow_requantize = True
    params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{name.upper()}")
    assert lib.llama_model_quantize(model.encode(), str(path).encode(), params) == 0
    return str(path)


def edit(path: str, n_lines: int, old: str, new: str) -> tuple[str, str]:
    """A prompt that asks for an edit, and the edited text."""
    code = "\n".join((ROOT / path).read_text(encoding="utf-8").splitlines()[:n_lines])
    prompt = (
        f"<|im_start|>user\nRename `{old}` to `{new}` and print the whole file:\n\n"
        f"```python\n{code}\n```<|im_end|>\n<|im_start|>assistant\n```python\n"
    )
    return prompt, re.sub(rf"\b{old}\b", new, code) + "\n```"


Case = tuple[list[list[int]], int, SamplingParams, list[int]]  # what Runner.answer takes


def compare(name: str, runners: tuple[Runner, Runner], rounds: int, cases: list[Case]) -> None:
    without, with_guesses = runners
    with_guesses.n_guessed = with_guesses.n_right = 0
    clock, processor = [], []
    for n in range(rounds):
        for case in cases:
            first, second = runners if n % 2 else runners[::-1]
            rates = {first: first.answer(*case), second: second.answer(*case)}
            clock.append(rates[with_guesses][0] / rates[without][0])
            processor.append(rates[with_guesses][1] / rates[without][1])
    report = {
        "what": name,
        "ratio": round(statistics.median(clock), 3),
        "ratio_of_processor_time": round(statistics.median(processor), 3),
        "all_ratios_of_processor_time": [round(ratio, 2) for ratio in sorted(processor)],
        "guessed": with_guesses.n_guessed,
        "right": with_guesses.n_right,
    }
    print(json.dumps(report), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="What guessed tokens save, on a real model.")
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="without flash attention")
    parser.add_argument("--as", dest="type", help="of the weights, such as q8_0")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if options.type:
            model = as_type(model, options.type, Path(folder) / f"{options.type}.gguf")
        new = partial(new_runner, model, options.threads, flash_attention=not options.plain)
        runners = new(speculates=False), new(speculates=True)
    print(json.dumps({"what": "prices of steps", **runners[0].prices()}), flush=True)
    ids = runners[0].ids
    edits = [(ids(prompt), ids(code)) for prompt, code in (edit(*asked) for asked in EDITS)]
    stories = [ids(f"Write a story about {topic}.\n\n") for topic in TOPICS]
    scripted: list[Case] = [([prompt], len(code), GREEDY, code) for prompt, code in edits]
    compare("edits of code, given answers", runners, options.rounds, scripted)
    own: list[Case] = [([prompt], 120, GREEDY, []) for prompt, _ in edits]
    compare("edits of code, the model's own answers", runners, options.rounds, own)
    alone: list[Case] = [([story], 120, WILD, []) for story in stories]
    compare("random text", runners, options.rounds, alone)
    compare("random text, four at once", runners, options.rounds, [(stories, 60, WILD, [])])
    for runner in runners:
        runner.engine.close()


if __name__ == "__main__":
    main()
