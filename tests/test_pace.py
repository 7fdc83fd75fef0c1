"""How a step is kept short, with costs that the test decides."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.pace import ALONE, DEEP_S, MIN_BESIDE, MIN_TOKENS, PROBE_TOKENS, SHARE, TILE, WIDE, Pace

MOST = 4096  # tokens that a step may have


def taught(
    decode_s: float,
    token_s: float,
    n_decodes: int = 4,
    max_stall_s: float | None = 0.2,
    *,
    has_tiles: bool = True,
) -> Pace:
    pace = Pace(max_stall_s, has_tiles=has_tiles)
    pace.observe(n_decodes, 0, decode_s)
    pace.observe(0, 100, 100 * token_s)
    return pace


def test_the_first_prompt_is_probed() -> None:
    assert Pace(0.2, has_tiles=True).n_prefill(0, MOST) == PROBE_TOKENS


def test_beside_streams_a_step_takes_no_longer_than_it_may() -> None:
    assert taught(decode_s=0.05, token_s=0.001).n_prefill(4, MOST) == 150


def test_without_streams_it_may_take_longer() -> None:
    assert taught(decode_s=0.05, token_s=0.001).n_prefill(0, MOST) == int(ALONE * 0.2 / 0.001)


@pytest.mark.parametrize(
    ("max_stall_s", "token_s", "n_tokens"),
    [
        (0.2, 0.001, 800), (0.2, 0.007, 128), (0.2, 0.01, 128), (0.2, 0.03, 66), (0.2, 0.04, 20),
        (0.2, 0.5, 16), (0.05, 0.002, 128), (0.05, 0.01, 20), (1.0, 0.04, 100),
    ],
)  # fmt: skip
def test_alone_it_takes_longer_where_that_makes_a_wide_step(
    max_stall_s: float, token_s: float, n_tokens: int
) -> None:
    pace = taught(decode_s=0.05, token_s=token_s, max_stall_s=max_stall_s)
    assert pace.n_prefill(0, MOST) == pytest.approx(n_tokens, abs=1)


@pytest.mark.parametrize(("max_stall_s", "n_tokens"), [(None, TILE), (0.2, MIN_TOKENS)])
def test_far_into_a_prompt_alone_a_step_stays_wide(
    max_stall_s: float | None, n_tokens: int
) -> None:
    pace = taught(decode_s=0.05, token_s=0.02, max_stall_s=max_stall_s)
    for _ in range(20):
        pace.observe(0, TILE, TILE * 0.08)
    assert pace.n_prefill(0, MOST) == n_tokens


@pytest.mark.parametrize(("first_s", "token_s"), [(0.04, 0.16), (0.08, 0.1)])
def test_what_is_or_has_become_slow_has_no_steps_of_many_seconds(
    first_s: float, token_s: float
) -> None:
    pace = taught(decode_s=0.05, token_s=first_s, max_stall_s=None)
    for _ in range(20):
        pace.observe(0, 16, 16 * token_s)
    assert pace.n_prefill(0, MOST) == MIN_TOKENS


def test_what_streams_hide_of_a_cost_is_not_the_least_that_there_was() -> None:
    pace = taught(decode_s=0.8, token_s=0.04, max_stall_s=None)
    for _ in range(20):
        pace.observe(4, 16, 0.4 + 16 * 0.04)  # they have become faster
    for token_s in (0.04, 0.075):
        for _ in range(20):
            pace.observe(0, 16, 16 * token_s)
    assert pace.n_prefill(0, MOST) == MIN_TOKENS


def beside_streams(
    pace: Pace,
    *,
    decode_s: float,
    token_s: float,
    wide_token_s: float,
    n_steps: int,
    n_most: int = MOST,
) -> list[tuple[int, float]]:
    """Prompt tokens and seconds of each step, where tokens of wide steps cost less."""
    steps = []
    for _ in range(n_steps):
        n = pace.n_prefill(4, n_most)
        steps.append((n, decode_s + n * (wide_token_s if n >= TILE else token_s)))
        pace.observe(4, *steps[-1])
    return steps


def test_deep_in_a_prompt_wide_steps_alternate_with_those_of_the_streams() -> None:
    pace = taught(decode_s=0.04, token_s=0.005, max_stall_s=None)
    steps = beside_streams(pace, decode_s=0.04, token_s=0.017, wide_token_s=0.011, n_steps=200)
    later = steps[50:]
    assert {n for n, _ in later} == {0, WIDE}
    alone_s = sum(seconds for n, seconds in later if n == 0) / sum(s for _, s in later)
    assert 0.15 < alone_s < 0.35
    assert max(seconds for _, seconds in later) < DEEP_S


@pytest.mark.parametrize(
    ("max_stall_s", "has_tiles", "token_s", "wide_token_s", "most_s"),
    [
        (0.2, True, 0.017, 0.01, 0.2), (None, False, 0.017, 0.017, 0.12),
        (None, True, 0.006, 0.0055, 0.12), (None, True, 0.04, 0.02, 0.2),
        (None, True, 0.029, 0.017, 0.16),
    ],
    ids=["a time is set", "no tiles", "not deep", "too long", "a little too long"],
)  # fmt: skip
def test_elsewhere_steps_beside_streams_stay_short(
    max_stall_s: float | None, has_tiles: bool, token_s: float, wide_token_s: float, most_s: float
) -> None:
    pace = taught(0.04, 0.005, max_stall_s=max_stall_s, has_tiles=has_tiles)
    costs = {"token_s": token_s, "wide_token_s": wide_token_s}
    steps = beside_streams(pace, decode_s=0.04, n_steps=200, **costs)
    later = steps[50:]
    assert max(n for n, _ in steps) < WIDE
    assert max(seconds for _, seconds in later) < most_s * 1.01
    assert sum(n for n, _ in later) > MIN_BESIDE * 75


@pytest.mark.parametrize("token_s", [0.013, 0.015])
def test_where_wide_steps_turn_out_no_cheaper_there_is_one(token_s: float) -> None:
    """As on a machine that has become slow, or where a step is computed in two."""
    pace = taught(decode_s=0.04, token_s=0.005, max_stall_s=None)
    costs = {"token_s": token_s, "wide_token_s": token_s}
    steps = beside_streams(pace, decode_s=0.04, n_steps=300, **costs)
    assert [n for n, _ in steps].count(WIDE) == 1


def test_what_is_left_of_a_deep_prompt_has_short_steps() -> None:
    pace = taught(decode_s=0.04, token_s=0.005, max_stall_s=None)
    costs = {"decode_s": 0.04, "token_s": 0.017, "wide_token_s": 0.011}
    beside_streams(pace, **costs, n_steps=100)
    later = beside_streams(pace, **costs, n_steps=20, n_most=TILE)
    assert max(seconds for _, seconds in later) < 0.25  # the first by what wide ones cost


def test_after_a_deep_prompt_the_next_has_short_steps_again() -> None:
    pace = taught(decode_s=0.04, token_s=0.005, max_stall_s=None)
    beside_streams(pace, decode_s=0.04, token_s=0.017, wide_token_s=0.01, n_steps=100)
    later = beside_streams(pace, decode_s=0.04, token_s=0.007, wide_token_s=0.0065, n_steps=60)
    assert max(seconds for _, seconds in later[40:]) < 0.13


def test_streams_that_waited_for_long_hold_up_prompts_for_a_moment_only() -> None:
    pace = taught(decode_s=0.05, token_s=0.001, max_stall_s=None)
    pace.observe(4, 100, 3600.0)  # the machine slept
    n_steps = 0
    while pace.n_prefill(4, MOST) == 0:
        pace.observe(4, 0, 0.05)
        n_steps += 1
    assert 1 <= n_steps <= 10


def test_a_step_of_the_streams_in_which_the_machine_slept_changes_little() -> None:
    pace = taught(decode_s=0.05, token_s=0.001, max_stall_s=None)
    pace.observe(4, 0, 3600.0)
    assert pace.n_prefill(4, MOST) <= 130


def test_a_jump_into_the_depth_is_no_reason_to_doubt_wide_steps() -> None:
    pace = taught(decode_s=0.04, token_s=0.005, max_stall_s=None)
    beside_streams(pace, decode_s=0.04, token_s=0.007, wide_token_s=0.006, n_steps=50)
    steps = beside_streams(pace, decode_s=0.04, token_s=0.017, wide_token_s=0.011, n_steps=100)
    assert {n for n, _ in steps[30:]} == {0, WIDE}


def test_without_streams_nothing_is_owed() -> None:
    pace = taught(decode_s=0.05, token_s=0.001, max_stall_s=None)
    pace.observe(4, 100, 1.0)
    assert pace.n_prefill(4, MOST) == 0
    pace.observe(0, 100, 0.1)
    assert pace.n_prefill(4, MOST) > 0


@pytest.mark.parametrize(
    ("n_decodes", "lengths", "max_stall_s", "n_tokens"),
    [
        (1, [100] * 10, None, 800),  # as many as end in a step alone
        (2, [30, 300, 400, 500], None, 730),
        (2, [300, 400, 500], None, 700),  # as many end as streams wait
        (2, [30, 20], None, 100),  # what prompts get in any case
        (2, [300, 600], None, 100),  # one would end, and two streams wait
        (9, [100] * 10, None, 100),
        (1, [900], None, 100),
        (1, [100] * 10, 0.15, 100),  # what is set holds
        (1, [], None, 100),  # a stream has a pace
    ],
)
def test_prompts_that_come_together_start_together(
    n_decodes: int, lengths: list[int], max_stall_s: float | None, n_tokens: int
) -> None:
    pace = taught(decode_s=0.05, token_s=0.001, max_stall_s=max_stall_s)
    assert pace.n_prefill(n_decodes, MOST, lengths) == pytest.approx(n_tokens, abs=1)


def test_who_has_just_begun_is_owed_nothing_and_may_wait_for_who_is() -> None:
    pace = taught(decode_s=0.05, token_s=0.001, max_stall_s=None)
    pace.observe(4, 800, 0.85, is_beginning=True)
    assert pace.n_prefill(4, MOST) == 100
    pace.observe(4, 800, 0.85)
    assert pace.n_prefill(4, MOST) == 0
    assert pace.n_prefill(4, MOST, [100] * 10) == 800


def test_a_slow_step_of_a_beginning_does_not_make_what_follows_wide() -> None:
    pace = taught(decode_s=0.1, token_s=0.005, max_stall_s=None)
    pace.observe(1, 100, 0.1 + 100 * 0.01, is_beginning=True)  # the machine is half as fast
    assert pace.n_prefill(2, MOST) < TILE


def test_a_prompt_gets_on_also_where_streams_alone_take_too_long() -> None:
    assert taught(decode_s=0.5, token_s=0.001).n_prefill(4, MOST) == int(SHARE * 0.5 / 0.001)
    assert taught(decode_s=0.5, token_s=0.1).n_prefill(4, MOST) == MIN_BESIDE


def test_where_no_time_is_set_it_is_three_gaps_of_the_streams_or_60_ms() -> None:
    for decode_s, n_tokens in ((0.05, 100), (0.2, 400), (0.004, 56)):
        n_prefill = taught(decode_s, token_s=0.001, max_stall_s=None).n_prefill(4, MOST)
        assert n_prefill == pytest.approx(n_tokens, abs=1)  # it rounds down


def test_where_no_time_is_set_prompts_get_on_and_take_their_time_alone() -> None:
    assert taught(decode_s=0.015, token_s=0.02, max_stall_s=None).n_prefill(1, MOST) == MIN_BESIDE
    assert taught(decode_s=0.05, token_s=0.001, max_stall_s=None).n_prefill(0, MOST) == 800


def test_the_streams_count_as_the_nearest_number_that_was_measured() -> None:
    pace = taught(decode_s=0.05, token_s=0.001, n_decodes=4)
    pace.observe(16, 0, 0.1)
    assert [pace.n_prefill(n, MOST) for n in (3, 5, 15, 40)] == [150, 150, 100, 100]


def test_steps_with_few_prompt_tokens_teach_nothing_about_prompts() -> None:
    pace = taught(decode_s=0.05, token_s=0.001, has_tiles=False)  # which owes streams nothing
    pace.observe(4, 1, 5.0)
    assert pace.n_prefill(4, MOST) == 150


def test_steps_beside_streams_teach_with_as_few_tokens_as_they_may_have() -> None:
    pace = taught(decode_s=0.05, token_s=0.001)
    for _ in range(20):
        pace.observe(4, MIN_BESIDE, 0.05 + MIN_BESIDE * 0.03)
    assert pace.n_prefill(4, MOST) == pytest.approx(0.15 / 0.03, abs=1)


def test_alone_so_few_teach_nothing_since_the_step_itself_has_a_price() -> None:
    pace = taught(decode_s=0.05, token_s=0.001)
    pace.observe(0, MIN_BESIDE, 0.05)
    assert pace.n_prefill(4, MOST) == 150


@settings(max_examples=60)
@given(
    decode_s=st.floats(0.001, 0.15),
    token_s=st.floats(0.0001, 0.003),
    n_decodes=st.integers(1, 16),
    max_stall_s=st.sampled_from([0.2, None]),
)
def test_it_learns_whatever_a_step_costs(
    decode_s: float, token_s: float, n_decodes: int, max_stall_s: float | None
) -> None:
    pace = Pace(max_stall_s, has_tiles=True)
    stall_s = max_stall_s or max(3 * decode_s, 0.06)
    n_prefilled = 0
    for step in range(60):
        n = pace.n_prefill(n_decodes, MOST)
        seconds = decode_s + n * token_s
        if step > 30:
            floor_s = decode_s + max(MIN_BESIDE * token_s, SHARE * decode_s)
            assert seconds <= max(stall_s, floor_s) * 1.01
            n_prefilled += n
        pace.observe(n_decodes, n, seconds)
        pace.observe(n_decodes, 0, decode_s)
    assert n_prefilled >= 29 * MIN_BESIDE


def test_a_machine_that_slows_down_is_noticed() -> None:
    pace = taught(decode_s=0.02, token_s=0.001)
    for _ in range(12):
        pace.observe(4, 50, 0.02 + 50 * 0.003)
    assert pace.n_prefill(4, MOST) == pytest.approx(60, rel=0.1)
