"""Which texts go together: lists of plain calls."""

from engine.batcher import MAX_PASSED, WINDOW, Batcher

Texts = list[tuple[int, int]]


def batcher(n_tokens: int = 100, n_sequences: int = 10) -> Batcher:
    return Batcher(n_tokens=n_tokens, n_sequences=n_sequences)


def texts(*lengths: int) -> Texts:
    return list(enumerate(lengths))


def batches(of: Batcher) -> list[Texts]:
    """All that is left, batch by batch."""
    planned = []
    while not of.idle:
        planned.append(of.plan())
    return planned


def test_nothing_to_do_is_an_empty_batch() -> None:
    of = batcher()
    assert of.idle
    assert of.plan() == []
    of.add(1, [])
    assert of.idle


def test_texts_share_a_batch_as_long_as_their_tokens_fit() -> None:
    of = batcher(100)
    of.add(1, texts(50, 30, 20, 1))
    assert batches(of) == [[(1, 0), (1, 1), (1, 2)], [(1, 3)]]


def test_the_longest_goes_first_and_what_fits_fills_the_room() -> None:
    of = batcher(100)
    of.add(1, texts(10, 95, 60, 40, 4))
    assert batches(of) == [[(1, 1), (1, 4)], [(1, 2), (1, 3)], [(1, 0)]]


def test_a_text_longer_than_the_budget_travels_alone() -> None:
    of = batcher(100)
    of.add(1, texts(1, 8192, 100, 1))
    assert batches(of) == [[(1, 1)], [(1, 2)], [(1, 3), (1, 0)]]


def test_a_batch_has_no_more_sequences_than_the_context() -> None:
    of = batcher(100, n_sequences=3)
    of.add(1, texts(1, 1, 1, 1, 1, 1, 1))
    assert [len(batch) for batch in batches(of)] == [3, 3, 1]


def test_jobs_share_a_batch() -> None:
    of = batcher(100)
    for job in range(5):
        of.add(job, texts(20))
    assert batches(of) == [[(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)]]


def test_every_text_is_planned_once() -> None:
    of = batcher(64, n_sequences=7)
    lengths = [1 + (7 * i) % 90 for i in range(1000)]
    of.add(1, texts(*lengths))
    of.add(2, texts(*lengths[:50]))
    planned = [text for batch in batches(of) for text in batch]
    assert sorted(planned) == [(1, i) for i in range(1000)] + [(2, i) for i in range(50)]


def test_texts_are_sorted_within_a_window_only() -> None:
    of = batcher(1)
    of.add(1, texts(*[2] * WINDOW, 9))
    planned = [batch[0][1] for batch in batches(of)]
    assert planned[-1] == WINDOW
    assert sorted(planned[:-1]) == list(range(WINDOW))


def test_texts_that_come_later_go_after_those_of_their_job() -> None:
    of = batcher(100)
    of.add(1, [(0, 5)])
    of.add(1, [(1, 90), (2, 80)])
    assert batches(of) == [[(1, 0), (1, 1)], [(1, 2)]]


def test_a_small_job_goes_into_the_next_batch_beside_a_big_one() -> None:
    of = batcher(100)
    of.add(1, texts(*[50] * 100))
    of.plan()
    of.add(2, texts(30))
    of.add(3, texts(20, 20))
    first, second = of.plan(), of.plan()
    assert (2, 0) in first + second
    assert {(3, 0), (3, 1)} <= set(first + second)


def test_two_big_jobs_get_the_same_number_of_tokens() -> None:
    of = batcher(100)
    of.add(1, texts(*[10] * 500))
    of.add(2, texts(*[50] * 100))
    n_tokens = {1: 0, 2: 0}
    for _ in range(20):
        for job, _index in of.plan():
            n_tokens[job] += 10 if job == 1 else 50
    assert abs(n_tokens[1] - n_tokens[2]) <= 50


def test_what_a_job_had_alone_is_not_held_against_it() -> None:
    of = batcher(100)
    of.add(1, texts(*[50] * 100))
    for _ in range(20):
        of.plan()
    of.add(2, texts(*[50] * 100))
    planned = [of.plan() for _ in range(10)]
    assert all({job for job, _ in batch} == {1, 2} for batch in planned)


def test_a_job_of_long_texts_does_not_starve_beside_a_stream_of_newcomers() -> None:
    of = batcher(100)
    of.add(0, texts(*[90] * 3))
    served_at = []
    for job in range(1, 30):
        of.add(job, texts(60))
        if any(planned == 0 for planned, _ in of.plan()):
            served_at.append(job)
    assert len(served_at) == 3
    assert served_at[-1] <= 3 * (MAX_PASSED + 1)


def test_nobody_waits_for_ever_when_more_comes_than_can_be_done() -> None:
    of = batcher(10, n_sequences=1)
    done: set[int] = set()
    for job in range(300):
        of.add(2 * job, texts(5))
        of.add(2 * job + 1, texts(5))
        done |= {planned for planned, _ in of.plan()}
    assert done >= set(range(150)), "the oldest go first"


def test_a_cancelled_job_is_planned_no_more() -> None:
    of = batcher(10)
    of.add(1, texts(10, 10, 10))
    of.add(2, texts(10))
    of.plan()
    of.cancel(1)
    of.cancel(7)  # nobody
    assert {job for batch in batches(of) for job, _ in batch} <= {2}
    assert of.idle


# small jobs beside large ones


def test_a_small_job_takes_no_large_one_along() -> None:
    of = batcher(1000)
    of.add(1, texts(*[400] * 5))
    assert of.plan() == [(1, 4), (1, 3)]
    of.add(2, texts(10))
    of.add(3, texts(20, 30))
    assert of.plan() == [(2, 0), (3, 1), (3, 0)]
    assert of.plan() == [(1, 2), (1, 1)]


def test_a_large_job_takes_small_ones_along() -> None:
    of = batcher(1000)
    of.add(1, texts(*[400] * 3))
    of.add(2, texts(*[300] * 3))
    for job in range(10, 10 + MAX_PASSED + 1):
        of.add(job, texts(100))
        planned = of.plan()
    assert planned == [(1, 2), (10 + MAX_PASSED, 0), (2, 2)]


def test_a_batch_that_was_given_up_comes_again_after_the_small_ones() -> None:
    of = batcher(1000)
    of.add(1, texts(*[400] * 5))
    given_up = of.plan()
    of.add(2, texts(10))
    assert of.may_give_up
    of.give_up(given_up)
    assert not of.may_give_up
    assert [of.plan(), of.plan()] == [[(2, 0)], given_up]
    assert not of.may_give_up, "once is enough"
    assert of.plan() == [(1, 2), (1, 1)]
    assert of.may_give_up


def test_a_batch_that_was_given_up_does_not_wait_for_ever() -> None:
    of = batcher(1000)
    of.add(1, texts(400, 400))
    given_up = of.plan()
    of.give_up(given_up)
    planned = []
    for job in range(2, 20):
        of.add(job, texts(10))
        planned.append(of.plan())
    assert planned.index(given_up) == MAX_PASSED


def test_a_batch_of_small_jobs_is_not_given_up() -> None:
    """Else a burst of single requests pays for one batch more."""
    of = batcher(1000)
    of.add(1, texts(400))
    for job in range(2, 8):
        of.add(job, texts(100))
    assert len(of.plan()) == 6
    assert not of.may_give_up
    assert of.plan() == [(1, 0)]
    assert of.may_give_up


def test_a_cancelled_job_leaves_the_batch_that_was_given_up() -> None:
    of = batcher(1000)
    of.add(1, texts(300))
    of.add(2, texts(400))
    of.give_up(of.plan())
    of.cancel(2)
    assert batches(of) == [[(1, 0)]]
    of.add(3, texts(300))
    of.give_up(of.plan())
    of.cancel(3)
    assert of.idle


def test_no_text_overtakes_those_of_its_own_job_that_were_given_up() -> None:
    """Documents are compared with the queries before them."""
    of = batcher(500)
    of.add(1, texts(500))
    of.add(1, [(1, 50)])
    given_up = of.plan()
    of.add(2, texts(10))
    of.give_up(given_up)
    assert batches(of) == [[(2, 0)], [(1, 0)], [(1, 1)]]
