"""The prompts that MLX remembers: plain calls, with layers that only count."""

from dataclasses import dataclass

import numpy as np

from engine.backends.mlx_prompts import Prompts, as_tokens, beginning, can_cut


@dataclass
class Layer:
    n_tokens: int
    can_trim: bool = True
    bytes_each: int = 10
    start_position: int = 0  # tokens before it are dropped, as a chunked layer does

    @property
    def nbytes(self) -> int:
        return self.n_tokens * self.bytes_each

    def is_trimmable(self) -> bool:
        return self.can_trim

    def trim(self, n: int) -> None:
        assert self.can_trim
        self.n_tokens -= n


def remember(prompts: Prompts, *tokens: int) -> None:
    prompts.remember(0, as_tokens(tokens), [Layer(len(tokens))])


def recalled(prompts: Prompts, *wanted: int) -> int:
    """How many tokens the cache that comes back has."""
    found = prompts.recall(1, as_tokens(wanted))
    if found is None:
        return 0
    n, (layer,) = found
    assert n == layer.n_tokens == prompts.n_known(as_tokens(wanted))
    return n


def test_the_longest_beginning_comes_back_cut_to_what_is_wanted() -> None:
    prompts = Prompts(10_000)
    assert recalled(prompts, 1, 2) == 0
    remember(prompts, 1, 2, 3, 4)
    remember(prompts, 1, 2, 9, 9, 9)
    assert recalled(prompts, 1, 2, 3) == 3
    assert recalled(prompts, 1, 2, 3, 4, 5) == 4
    assert recalled(prompts, 1, 2, 9, 9, 8) == 4
    assert recalled(prompts, 7, 2, 3) == 0
    assert recalled(prompts, 1, 2, 3, 4, 5) == 4, "what came back was a copy"


def test_what_has_lost_its_beginning_cannot_be_cut() -> None:
    """Though its layers say that they can be."""
    assert can_cut([Layer(4), Layer(4)])
    assert not can_cut([Layer(4), Layer(4, start_position=2)])
    assert not can_cut([Layer(4), Layer(4, can_trim=False)])


def test_a_beginning_of_another_is_not_kept_twice() -> None:
    prompts = Prompts(10_000)
    remember(prompts, 1, 2)
    remember(prompts, 1, 2, 3, 4)
    assert (len(prompts), prompts.n_bytes) == (1, 40)
    remember(prompts, 1, 2, 3)
    assert (len(prompts), prompts.n_bytes) == (1, 40)


def test_the_least_recently_used_goes_first_and_bytes_are_bounded() -> None:
    prompts = Prompts(60)
    remember(prompts, 1, 1)
    remember(prompts, 2, 2)
    remember(prompts, 3, 3)
    assert prompts.n_bytes == 60
    assert recalled(prompts, 1, 1, 5) == 2
    remember(prompts, 4, 4)
    assert [recalled(prompts, n, n, 5) for n in (1, 2, 3, 4)] == [2, 0, 2, 2]
    remember(prompts, 3)  # known: it was of use
    remember(prompts, 5, 5)
    assert [prompts.n_known(as_tokens([n, n])) for n in (1, 3, 4, 5)] == [0, 2, 2, 2]
    remember(prompts, *range(100))
    assert prompts.n_bytes == 60, "what is too big for all of it forgets nobody"


def test_with_less_room_what_is_too_big_goes_first_then_the_least_recently_used() -> None:
    prompts = Prompts(90)
    for tokens in ((1, 1), (2, 2), range(5)):
        remember(prompts, *tokens)
    assert prompts.n_bytes == 90
    prompts.resize(45)
    assert [prompts.n_known(as_tokens([n, n])) for n in (0, 1, 2)] == [0, 2, 2]
    prompts.resize(30)
    assert [prompts.n_known(as_tokens([n, n])) for n in (0, 1, 2)] == [0, 0, 2]
    prompts.resize(70)
    remember(prompts, *range(5))
    assert (len(prompts), prompts.n_bytes) == (2, 70)


def test_what_is_wanted_may_be_nothing() -> None:
    prompts = Prompts(100)
    remember(prompts, 1, 2)
    assert recalled(prompts) == 0
    remember(prompts)
    assert len(prompts) == 1


def test_a_beginning_is_a_copy() -> None:
    layer = Layer(5)
    (own,) = beginning([layer], 5, 2)
    assert (own.n_tokens, layer.n_tokens) == (2, 5)
    assert as_tokens([1, 2]).dtype == np.int32
