"""How sequences choose their tokens on llama.cpp."""

import ctypes
from functools import lru_cache, partial
from typing import Any

import llama_cpp as lib
import numpy as np
import numpy.typing as npt

from engine.backends.base import Constraint
from engine.backends.llama_tokenizer import LlamaTokenizer
from engine.drawing import RowSampler
from engine.dry import Dry
from engine.sampling import Rules, logprobs
from engine.types import Sampled, SamplingParams

# Before samplers that take the logarithm of each probability: one of 0 makes all of them NaN. So
# much of the likeliest one's has every candidate that is not forbidden and could ever be drawn.
NOT_ZERO = 1e-30


class Samplers:
    """Makes them, for a model with so many cells."""

    def __init__(self, model: Any, tokenizer: LlamaTokenizer, n_cells: int) -> None:
        self._tokenizer = tokenizer
        self._n_cells = n_cells
        vocab = lib.llama_model_get_vocab(model)
        n = ctypes.c_int32()
        suppressed = lib.llama_vocab_get_suppress_tokens(vocab, ctypes.byref(n))
        self._suppressed: list[int] = suppressed[: n.value] if n.value else []
        self._dry = lru_cache(maxsize=8)(partial(LlamaDry, vocab))

    def new(self, sampling: SamplingParams, prompt: list[int]) -> "LlamaSampler | RowSampler":
        """In numpy for Mirostat 1: in llama.cpp the number of candidates overflows where the
        surprise that it aims at cannot be reached, and one is left for good."""
        ends = self._tokenizer.ends if sampling.ignore_eos or sampling.min_tokens else []
        rules = Rules(sampling, prompt, ends, self._suppressed)
        if sampling.mirostat == 1 and not sampling.is_greedy:
            return RowSampler(sampling, prompt, rules, self._tokenizer.piece)
        return LlamaSampler(sampling, rules, self._new_chain(sampling, prompt))

    def _new_chain(self, sampling: SamplingParams, prompt: list[int]) -> Any:
        """llama.cpp's samplers in the order of its server; None where the likeliest token is all
        that is wanted."""
        has_dry = Dry.wanted(sampling)
        if sampling.is_greedy and not has_dry and sampling.xtc_probability == 0:
            return None
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        add = partial(lib.llama_sampler_chain_add, chain)
        # llama.cpp draws its own seed for 0xFFFFFFFF
        seed = sampling.seed if sampling.seed != 0xFFFFFFFF else 0x9E3779B9
        if has_dry:
            add(self._new_dry(sampling, prompt))
        if sampling.mirostat and not sampling.is_greedy:
            tau, eta = sampling.mirostat_tau, sampling.mirostat_eta
            add(lib.llama_sampler_init_temp(sampling.temperature))
            add(lib.llama_sampler_init_mirostat_v2(seed, tau, eta))
            return chain
        if sampling.top_k > 0:
            add(lib.llama_sampler_init_top_k(sampling.top_k))
        if sampling.typical_p < 1:
            add(lib.llama_sampler_init_min_p(NOT_ZERO, 1))
            add(lib.llama_sampler_init_typical(sampling.typical_p, 1))
        if sampling.top_p < 1:
            add(lib.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0:
            add(lib.llama_sampler_init_min_p(sampling.min_p, 1))
        if sampling.xtc_probability > 0:
            probability, threshold = sampling.xtc_probability, sampling.xtc_threshold
            add(lib.llama_sampler_init_xtc(probability, threshold, 1, seed))
        if sampling.is_greedy:
            add(lib.llama_sampler_init_greedy())
        else:
            add(lib.llama_sampler_init_temp(sampling.temperature))
            add(lib.llama_sampler_init_dist(seed))
        return chain

    def _new_dry(self, sampling: SamplingParams, prompt: list[int]) -> Any:
        asked = sampling.dry_penalty_last_n
        last_n = self._n_cells if asked < 0 else min(asked, self._n_cells)
        sampler = self._dry(
            sampling.dry_multiplier,
            sampling.dry_base,
            sampling.dry_allowed_length,
            last_n,
            sampling.dry_sequence_breakers,
        ).copy()
        for token in prompt[-last_n:]:
            lib.llama_sampler_accept(sampler, token)
        return sampler


class LlamaSampler:
    """How one sequence chooses: penalties, then argmax or a chain of llama.cpp's samplers, which
    it owns."""

    def __init__(self, sampling: SamplingParams, rules: Rules, chain: Any) -> None:
        self._chain = chain
        self._n_logprobs = sampling.n_logprobs
        self._rules = rules

    def sample(
        self,
        context: Any,
        index: int,
        logits: npt.NDArray[np.float32],
        constraint: Constraint | None,
    ) -> Sampled:
        raw = logits
        if self._n_logprobs is not None and self._rules.changes(constraint):
            raw = logits.copy()
        self._rules.apply(logits, constraint)
        if self._chain is None:
            token = int(logits.argmax())
        else:
            token = lib.llama_sampler_sample(self._chain, context, index)
            if logits[token] == -np.inf:  # XTC and DRY may leave only what is forbidden
                token = int(logits.argmax())
        self._rules.accept(token, constraint)
        if self._n_logprobs is None:
            return Sampled(token)
        return Sampled(token, *logprobs(raw, token, self._n_logprobs))

    def __del__(self) -> None:
        if self._chain is not None:
            lib.llama_sampler_free(self._chain)


class LlamaDry:
    """A DRY sampler to be copied. Making one searches the vocabulary for what holds a breaker, and
    takes 10 ms for 50,000 tokens."""

    def __init__(
        self,
        vocab: Any,
        multiplier: float,
        base: float,
        allowed_length: int,
        last_n: int,
        breakers: tuple[str, ...],
    ) -> None:
        texts = (ctypes.c_char_p * len(breakers))(*(text.encode() for text in breakers))
        self._sampler = lib.llama_sampler_init_dry(
            vocab, multiplier, base, allowed_length, last_n, texts, len(breakers)
        )

    def copy(self) -> Any:
        return lib.llama_sampler_clone(self._sampler)

    def __del__(self) -> None:
        lib.llama_sampler_free(self._sampler)
