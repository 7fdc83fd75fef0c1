"""What a newcomer need not compute, as lists of plain calls: cells of conversations that went
before, of sequences that run, and of the prefix tree."""

import pytest

from engine.marks import TAIL
from engine.scheduler import WORTH_WAITING_FOR
from tests.scheduling import BLOCK, Bench, answer_to, tokens


def test_the_next_turn_of_a_conversation_decodes_only_what_is_new() -> None:
    bench = Bench()
    bench.talk(1, tokens(1000, 10), n_wanted=5)
    history = tokens(1000, 10) + bench.answers[1]
    second = bench.talk(2, history + tokens(2000, 3), n_wanted=4)
    # the last token that was sampled has no cell: nothing came after it
    assert second.n_cached == 14
    assert bench.answers[2] == answer_to(history + tokens(2000, 3), 4)


def test_the_same_prompt_again_decodes_its_last_token_for_the_logits() -> None:
    bench = Bench()
    prompt = tokens(1000, 10)
    bench.talk(1, prompt, n_wanted=3)
    again = bench.add(2, prompt, n_wanted=3)
    assert bench.step() == {2: 1}
    assert again.n_cached == 9
    bench.run()
    assert bench.answers[2] == bench.answers[1]


def test_a_regenerated_turn_keeps_what_comes_before_it() -> None:
    bench = Bench()
    bench.talk(1, tokens(1000, 10), n_wanted=8)
    edited = tokens(1000, 9) + tokens(2000, 4)
    assert bench.talk(2, edited, n_wanted=4).n_cached == 9
    assert bench.answers[2] == answer_to(edited, 4)


def test_each_conversation_finds_its_own_slot() -> None:
    bench = Bench(n_slots=3)
    first = {id: tokens(1000 * id, 10) for id in (1, 2, 3)}
    for id, prompt in first.items():
        bench.talk(id, prompt)
    for id in (2, 3, 1):
        assert bench.talk(10 + id, [*first[id], 7, 8]).n_cached == 10


def test_a_short_match_is_used_and_does_not_overwrite_the_other_conversation() -> None:
    bench = Bench(n_slots=2)
    system = tokens(1000, 4)
    bench.talk(1, system + tokens(2000, 20))
    assert bench.talk(2, system + tokens(3000, 20)).n_cached == 4
    assert bench.talk(3, system + tokens(2000, 20) + [7]).n_cached == 24
    assert bench.talk(4, system + tokens(3000, 20) + [7]).n_cached == 24


def test_the_longest_match_is_taken() -> None:
    bench = Bench(n_slots=3)
    bench.add(1, tokens(1000, 6) + tokens(2000, 3), n_wanted=1)
    bench.add(2, tokens(1000, 8) + tokens(3000, 1), n_wanted=1)
    bench.run()
    assert bench.talk(3, tokens(1000, 12)).n_cached == 8


def test_many_conversations_are_remembered_beyond_the_slots_and_the_cells() -> None:
    bench = Bench(n_slots=2, n_cells=64)
    for id in range(1, 9):
        bench.talk(id, tokens(1000 * id, 30))
    for id in range(1, 9):
        assert bench.talk(10 + id, [*tokens(1000 * id, 30), 7]).n_cached == 30


def test_what_is_remembered_is_bounded_and_the_least_recently_used_is_forgotten() -> None:
    bench = Bench(n_slots=1, tree_bytes=4 * 65)
    for id in (1, 2, 3):
        bench.talk(id, tokens(1000 * id, 30))
    assert bench.talk(4, [*tokens(1000, 30), 7]).n_cached == 30  # moves 3 out, and 2 is too much
    assert bench.talk(5, [*tokens(2000, 30), 7]).n_cached == 0


def test_a_running_sequence_shares_its_cells() -> None:
    bench = Bench(n_slots=3, n_cells=64)
    bench.add(1, tokens(1000, 40))
    bench.step()
    twin = bench.add(2, tokens(1000, 40))
    cousin = bench.add(3, tokens(1000, 35) + tokens(2000, 5))
    assert bench.step() == {1: 1, 2: 1, 3: 5}
    assert (twin.n_cached, cousin.n_cached) == (39, 35)
    assert bench.memory.n_used == 41 + 1 + 5


def test_shared_cells_stay_while_anybody_holds_them() -> None:
    bench = Bench(n_slots=3, n_cells=64)
    bench.add(1, tokens(1000, 40))
    bench.step()
    bench.add(2, tokens(1000, 40), n_wanted=6)
    bench.step()
    bench.cancel(1)
    bench.add(3, tokens(3000, 2), n_wanted=1)  # moves out what nobody runs in
    bench.run()
    assert bench.answers[2] == answer_to(tokens(1000, 40), 6)


def test_newcomers_with_a_common_beginning_wait_for_one_prefill_and_share_it() -> None:
    bench = Bench(n_slots=8, n_batch=16)
    system = tokens(1000, 100)
    for id in range(1, 9):
        bench.add(id, system + tokens(2000 + 10 * id, 5), n_wanted=3)
    bench.run()
    assert bench.n_decoded == 100 + 8 * 5
    assert bench.answers == {
        id: answer_to(system + tokens(2000 + 10 * id, 5), 3) for id in range(1, 9)
    }


def test_those_who_wait_for_a_prefill_hold_nobody_up() -> None:
    bench = Bench(n_slots=4, n_batch=16)
    bench.add(1, tokens(1000, 100))
    bench.add(2, tokens(1000, 100))
    bench.add(3, tokens(3000, 4))
    assert bench.step() == {3: 4, 1: 12}


def test_when_as_many_wait_for_a_prefill_as_there_are_slots_the_rest_waits_too() -> None:
    bench = Bench(n_slots=2, n_batch=10, n_prefill=10)
    bench.add(1, tokens(1000, 200))
    bench.step()
    for id in (2, 3):
        bench.add(id, tokens(1000, 190) + tokens(1000 * id, 5))
    bench.add(4, tokens(9000, 10))
    bench.step()
    assert bench.started == [1]


def test_who_waits_for_a_prefill_that_is_cancelled_goes_on_with_it() -> None:
    bench = Bench(n_slots=4, n_batch=16)
    bench.add(1, tokens(1000, 100))
    second = bench.add(2, tokens(1000, 100), n_wanted=2)
    bench.step()
    bench.step()
    bench.cancel(1)
    bench.run()
    assert second.n_cached == 32
    assert bench.answers[2] == answer_to(tokens(1000, 100), 2)


def test_a_short_common_beginning_is_not_worth_waiting_for() -> None:
    bench = Bench(n_slots=2, n_batch=100)
    common = tokens(1000, WORTH_WAITING_FOR - 1)
    bench.add(1, common + tokens(2000, 5))
    bench.add(2, common + tokens(3000, 5))
    assert set(bench.step()) == {1, 2}


def test_idle_cells_move_out_a_block_in_each_step_while_somebody_runs() -> None:
    bench = Bench(n_slots=4, n_cells=2000, n_batch=1000)
    for id in (1, 2):
        bench.add(id, tokens(10_000 * id, BLOCK + 50), n_wanted=1)
    bench.run()
    assert bench.memory.n_used == 2 * (BLOCK + 50)
    bench.add(3, tokens(50_000, 5))
    used = []
    for _ in range(6):
        bench.step()
        used.append(bench.memory.n_used - bench.sequences[3].n_past)
    assert used == [2 * BLOCK + 100, BLOCK + 50, BLOCK + 50, 0, 0, 0]
    for id in (1, 2):
        twin = bench.add(10 + id, tokens(10_000 * id, BLOCK + 50), n_wanted=1)
        bench.step()
        assert twin.n_cached == BLOCK + 49


def test_only_the_blocks_that_are_wanted_come_back() -> None:
    bench = Bench(n_slots=1, n_cells=2000, n_batch=2000)
    bench.talk(1, tokens(1000, 3 * BLOCK))
    bench.talk(2, tokens(9000, 5))
    bench.memory.n_loaded = 0
    assert bench.talk(3, [*tokens(1000, 20), 7]).n_cached == 20
    assert bench.memory.n_loaded == BLOCK


def test_the_first_answers_of_all_jobs_come_before_the_second_ones() -> None:
    bench = Bench(n_slots=2)
    for id in range(1, 9):
        bench.add(id, tokens(1000, 10), n_wanted=2, rank=id - 1)
    bench.step()
    bench.step()
    bench.add(9, tokens(9000, 3), n_wanted=1)
    bench.run()
    assert list(bench.answers).index(9) <= 3


def test_a_prompt_cached_up_to_its_last_token_goes_beside_the_decodes() -> None:
    bench = Bench(n_slots=2, n_batch=4)
    bench.talk(1, tokens(1000, 12))
    bench.add(2, tokens(2000, 3))
    bench.step()
    bench.add(3, tokens(1000, 12))
    assert bench.step() == {2: 1, 3: 1}


def test_memory_that_cannot_drop_an_end_decodes_the_whole_prompt_again() -> None:
    bench = Bench(is_cells=False)
    prompt = tokens(1000, 10)
    bench.talk(1, prompt, n_wanted=5)
    again = bench.talk(2, prompt, n_wanted=5)
    assert again.n_cached == 0
    assert bench.answers[2] == bench.answers[1] == answer_to(prompt, 5)


def test_memory_that_cannot_drop_an_end_still_goes_on_where_it_stopped() -> None:
    bench = Bench(is_cells=False)
    bench.talk(1, tokens(1000, 10), n_wanted=5)
    history = tokens(1000, 10) + bench.answers[1]
    assert bench.talk(2, [*history, 7], n_wanted=2).n_cached == 14
    assert bench.answers[2] == answer_to([*history, 7], 2)


def test_memory_that_cannot_be_cut_remembers_a_conversation_in_each_slot() -> None:
    bench = Bench(n_slots=3, is_cells=False)
    for id in (1, 2, 3):
        bench.talk(id, tokens(1000 * id, 10))
    for id in (2, 3, 1):
        assert bench.talk(10 + id, [*tokens(1000 * id, 10), 7, 8]).n_cached == 10


def conversation(bench: Bench, id: int, prompt: list[int]) -> list[int]:
    """A prompt, and its continuation in which the answer is another than was said."""
    bench.talk(id, prompt, n_wanted=20)
    return [*prompt, *tokens(9000, 5), *tokens(id * 100, 20)]


def test_memory_that_cannot_be_cut_goes_on_from_near_a_prompts_end() -> None:
    bench = Bench(is_cells=False)
    again = conversation(bench, 1, tokens(1000, 150))
    assert bench.talk(2, again, n_wanted=5).n_cached == 150 - TAIL
    assert bench.answers[2] == answer_to(again, 5)


def test_it_is_marked_at_lengths_that_double() -> None:
    bench = Bench(is_cells=False, n_batch=200)
    prompt = tokens(1000, 700)
    bench.talk(1, prompt)
    for n, n_cached in ((699, 696), (600, 512), (511, 256), (256, 256), (255, 0)):
        other = prompt[:n] + tokens(3000, 30)
        assert bench.talk(10 + n, other).n_cached == n_cached
        assert bench.answers[10 + n] == answer_to(other, 1)


def test_a_conversation_is_not_lost_for_a_shorter_beginning() -> None:
    bench = Bench(is_cells=False, n_slots=3)
    first = conversation(bench, 1, tokens(1000, 600))
    bench.talk(2, tokens(1000, 260) + tokens(5000, 30))
    assert bench.memory.n_rewound == 1, "in a slot of its own"
    assert bench.talk(3, first).n_cached == 600 - TAIL


def test_nor_for_a_longer_one_while_a_slot_is_empty() -> None:
    bench = Bench(is_cells=False, n_slots=2, n_cells=3000)
    first = conversation(bench, 1, tokens(1000, 600))
    bench.talk(2, tokens(1000, 530) + tokens(5000, 30))
    assert bench.talk(3, first).n_cached == 600 - TAIL


def test_nor_where_each_needs_cells_of_its_own_and_these_are_free() -> None:
    bench = Bench(is_cells=False, shares_cells=False, n_slots=3, n_cells=2000)
    first = conversation(bench, 1, tokens(1000, 600))
    bench.talk(2, tokens(1000, 260) + tokens(5000, 30))
    assert bench.talk(3, first).n_cached == 600 - TAIL


def test_a_conversation_goes_on_in_its_slot_if_only_its_last_answer_is_lost() -> None:
    bench = Bench(is_cells=False, n_slots=2)
    bench.talk(2, conversation(bench, 1, tokens(1000, 150)))
    assert [len(cells) > 0 for cells in bench.memory.slots] == [True, False]


def test_who_shares_a_beginning_can_be_cut_where_that_was_marked() -> None:
    bench = Bench(is_cells=False, n_slots=2, n_cells=3000, tree_bytes=2500)
    first = tokens(1000, 300)
    bench.talk(1, first)
    assert bench.talk(2, first[:260] + tokens(5000, 20)).n_cached == 256
    bench.talk(3, tokens(8000, 40))  # in the place of the first
    assert bench.talk(4, first[:258] + tokens(6000, 20)).n_cached == 256


def test_what_is_cut_off_takes_its_marks_along() -> None:
    bench = Bench(is_cells=False, n_slots=1, n_cells=3000, n_ctx=3000, n_batch=600)
    bench.talk(1, tokens(1000, 600))
    second = tokens(1000, 256) + tokens(5000, 200)
    bench.talk(2, second, n_wanted=200)
    third = [*second, *bench.answers[2][:190], 7, 8]  # cut where the first had a mark
    bench.talk(3, third, n_wanted=3)
    assert bench.answers[3] == answer_to(third, 3)


def test_where_each_needs_cells_of_its_own_a_newcomer_waits_until_there_are() -> None:
    bench = Bench(is_cells=False, shares_cells=False, n_cells=700)
    for id in (1, 2, 3):
        bench.add(id, tokens(1000, 300) + tokens(1000 * (id + 1), 20), n_wanted=3)
    bench.run()
    assert len(bench.answers) == 3
    assert bench.n_decoded < 2 * 330


def test_a_copy_larger_than_the_bound_costs_no_other_mark() -> None:
    bench = Bench(is_cells=False, tree_bytes=4 * 200)
    bench.talk(1, tokens(1000, 150))
    bench.talk(2, tokens(3000, 700))
    assert bench.talk(3, [*tokens(1000, 148), *tokens(7000, 20)]).n_cached == 146


def test_conversations_are_kept_outside_of_the_memory_when_others_come() -> None:
    bench = Bench(is_cells=False, n_slots=2, n_cells=3000, tree_bytes=100_000)
    again = [conversation(bench, id, tokens(1000 * id, 200 + id)) for id in range(1, 6)]
    for id, prompt in enumerate(again, 1):
        assert bench.talk(10 + id, prompt, n_wanted=3).n_cached == 200 + id - TAIL
        assert bench.answers[10 + id] == answer_to(prompt, 3)


def test_who_takes_a_beginning_of_one_that_is_kept_leaves_it_there() -> None:
    bench = Bench(is_cells=False, n_slots=1, n_cells=3000, tree_bytes=100_000)
    first = conversation(bench, 1, tokens(1000, 600))
    bench.talk(2, tokens(5000, 50))
    assert bench.talk(3, tokens(1000, 530) + tokens(6000, 50)).n_cached == 512
    assert bench.talk(4, first).n_cached == 600 - TAIL


def test_one_that_is_given_up_for_the_slot_that_makes_way_is_computed_anew() -> None:
    bench = Bench(is_cells=False, n_slots=1, n_cells=3000, tree_bytes=4 * 700)
    first = conversation(bench, 1, tokens(1000, 200))
    bench.talk(2, tokens(5000, 200), n_wanted=150)  # which takes the room that there is
    assert bench.talk(3, first, n_wanted=3).n_cached == 0
    assert bench.answers[3] == answer_to(first, 3)


@pytest.mark.parametrize(("is_cells", "n_slots"), [(True, 1), (False, 1), (False, 2)])
def test_what_a_memory_refuses_to_bring_back_is_computed_anew(is_cells: bool, n_slots: int) -> None:
    bench = Bench(is_cells=is_cells, n_slots=n_slots, n_cells=3000)
    again = conversation(bench, 1, tokens(1000, 300))
    bench.talk(2, tokens(5000, 50))
    bench.memory.refuses = 1.0
    assert bench.talk(3, again, n_wanted=3).n_cached == 0
    assert bench.answers[3] == answer_to(again, 3)


def test_idle_slots_do_not_stay_in_the_memory_beside_prompts_alone() -> None:
    bench = Bench(is_cells=False, n_cells=3000, n_batch=50, tree_bytes=100_000)
    for id in (1, 2, 3):
        bench.talk(id, tokens(1000 * id, 200))
    bench.add(4, tokens(5000, 300), n_wanted=1)
    for _ in range(5):
        bench.step()
    assert [len(slot) > 0 for slot in bench.memory.slots].count(True) == 1
    bench.add(5, [*tokens(1000, 200), 7], n_wanted=2)
    bench.run()
    assert bench.answers[5] == answer_to([*tokens(1000, 200), 7], 2)
    assert bench.scheduler._cells._marks.n_bytes <= 100_000


def test_one_that_is_kept_is_not_loaded_for_a_small_part_of_it() -> None:
    bench = Bench(is_cells=False, n_slots=1, n_cells=9000, n_batch=500, tree_bytes=200_000)
    bench.talk(1, tokens(1000, 5000))
    bench.talk(2, tokens(20_000, 50))
    assert bench.talk(3, tokens(1000, 290) + tokens(30_000, 20)).n_cached == 0
    assert bench.talk(4, tokens(1000, 1100) + tokens(30_000, 20)).n_cached == 1024


def test_one_that_is_kept_does_not_wait_for_less_than_it_has() -> None:
    bench = Bench(is_cells=False, n_cells=3000, n_batch=50, tree_bytes=100_000)
    again = conversation(bench, 1, tokens(1000, 500))
    bench.add(2, tokens(1000, 300) + tokens(5000, 300), n_wanted=1)
    bench.step()
    bench.step()
    assert not any(bench.memory.tokens(slot)[:500] == again[:500] for slot in range(4)), "kept"
    bench.add(3, again, n_wanted=1)
    bench.step()
    assert bench.started == [1, 2, 3]
    bench.run()
    assert bench.answers[3] == answer_to(again, 1)


def test_one_is_not_kept_at_the_cost_of_marks() -> None:
    bench = Bench(is_cells=False, n_cells=3000, n_batch=100, tree_bytes=4 * 600)
    bench.talk(1, tokens(1000, 150))
    bench.add(2, tokens(5000, 700), n_wanted=1)
    for _ in range(4):
        bench.step()
    assert bench.talk(3, [*tokens(1000, 148), *tokens(7000, 20)]).n_cached == 146


def test_what_is_too_large_to_be_kept_stays_where_it_is() -> None:
    bench = Bench(is_cells=False, n_cells=3000, tree_bytes=4 * 300)
    bench.talk(1, tokens(1000, 200), n_wanted=5)
    history = [*tokens(1000, 200), *bench.answers[1]]
    bench.talk(2, tokens(5000, 100))
    assert bench.talk(3, [*history, 7]).n_cached == 204


def test_it_is_lost_where_more_is_gained_or_no_slot_is_left() -> None:
    bench = Bench(is_cells=False, n_slots=1)
    first = conversation(bench, 1, tokens(1000, 600))
    assert bench.talk(2, tokens(1000, 260) + tokens(5000, 30)).n_cached == 256
    assert bench.talk(3, first).n_cached == 256


def test_newcomers_wait_for_marks_that_another_prefill_comes_to() -> None:
    bench = Bench(is_cells=False, n_cells=3000, n_batch=100)
    for id in (1, 2, 3):
        bench.add(id, tokens(1000, 300) + tokens(1000 * (id + 1), 20), n_wanted=3)
    bench.run()
    assert bench.n_decoded == 320 + 2 * 20
    for id in (1, 2, 3):
        prompt = tokens(1000, 300) + tokens(1000 * (id + 1), 20)
        assert bench.answers[id] == answer_to(prompt, 3)


def test_marks_have_a_bound_in_bytes_and_none_are_made_without_room() -> None:
    bench = Bench(is_cells=False, tree_bytes=4 * 150)
    bench.talk(1, tokens(1000, 150))
    bench.talk(2, tokens(3000, 150))
    assert bench.talk(3, [*tokens(3000, 148), *tokens(7000, 20)]).n_cached == 146
    assert bench.talk(4, [*tokens(1000, 148), *tokens(7000, 20)]).n_cached == 0
    bench = Bench(is_cells=False, tree_bytes=0)
    bench.add(1, tokens(1000, 90))
    assert bench.step() == {1: 90}, "in one piece"


def test_whoever_must_not_reuse_is_computed_in_the_same_pieces() -> None:
    bench = Bench(is_cells=False)
    bench.add(1, tokens(1000, 90), reuses=False)
    assert bench.step() == {1: 90}


def test_memory_that_cannot_be_cut_holds_nobody_up() -> None:
    bench = Bench(n_slots=2, n_cells=506, n_prefill=16, is_cells=False)
    bench.add(1, tokens(1000, 367), n_wanted=3)
    bench.add(2, tokens(1000, 157) + tokens(2000, 28), n_wanted=3)
    bench.run()
    assert len(bench.answers) == 2


def test_an_idle_twin_of_what_runs_costs_a_newcomer_nothing() -> None:
    bench = Bench(n_slots=4, n_cells=150)
    bench.add(1, tokens(1000, 100), n_wanted=40)
    bench.step()
    bench.add(2, [*tokens(1000, 100), 7], n_wanted=1)
    bench.step()
    bench.add(3, [*tokens(1000, 100), 8], n_wanted=1)
    bench.step()
    assert 3 in bench.answers


# who must not reuse: the same numbers every time


def test_without_reuse_and_company_a_prompt_is_computed_whole_in_empty_cells() -> None:
    bench = Bench(n_batch=100, n_prefill=7)
    prompt = tokens(1000, 150)
    bench.talk(1, prompt, n_wanted=3)
    bench.talk(2, tokens(5000, 20), n_wanted=3)
    again = bench.add(3, prompt, n_wanted=3, reuses=False)
    assert bench.step() == {3: 100}, "as much as a batch takes, whatever the pace"
    assert bench.memory.n_used == 100, "and from the first cell on"
    assert bench.step() == {3: 50}
    assert again.n_cached == 0
    bench.run()
    assert bench.answers[3] == bench.answers[1]
    assert bench.talk(4, prompt, n_wanted=3).n_cached == 149, "what it computed is for others"


def test_without_reuse_a_prompt_has_the_pace_of_the_others_beside_them() -> None:
    bench = Bench(n_batch=100, n_prefill=7)
    bench.add(1, tokens(1000, 5))
    bench.step()
    bench.add(2, tokens(2000, 50), reuses=False)
    assert bench.step() == {1: 1, 2: 7}


@pytest.mark.parametrize("n_tokens", [20, 300, 600])
def test_the_answers_of_a_job_without_reuse_share_a_prompt_that_can_only_be_marked(
    n_tokens: int,
) -> None:
    prompt = tokens(1000, n_tokens)
    bench = Bench(n_slots=4, n_cells=4000, n_batch=256, is_cells=False)
    numbers = []
    for at in (10, 20, 30):
        bench.n_decoded = 0
        steps = []
        for i in range(6):
            first = at if i else None
            bench.add(at + i, prompt, 3 + i, rank=10.0 * i, reuses=False, goes_on_from=first)
        while not bench.scheduler.idle:
            steps.append(sorted((id - at, n) for id, n in bench.step().items()))
        assert bench.answers[at + 5] == answer_to(prompt, 8)
        numbers.append((steps, bench.n_decoded))
    assert numbers[1] == numbers[2] == numbers[0]
    assert numbers[0][1] < 1.2 * n_tokens + 6


@pytest.mark.parametrize("n_slots", [3, 5])
def test_the_answers_of_a_job_without_reuse_have_the_same_steps_whatever_is_known(
    n_slots: int,
) -> None:
    """They end one after the other; one waits for a place, or what ended lies there."""
    prompt = tokens(1000, 600)
    jobs = []
    bench = Bench(n_slots=n_slots, n_cells=2000, n_prefill=7)
    for at in (10, 20, 30):
        steps: list[tuple[list[int], int]] = []
        jobs.append(steps)
        for i, n_wanted in enumerate((2, 9, 6, 4)):
            first = at if i else None
            bench.add(at + i, prompt, n_wanted, rank=10.0 * i, reuses=False, goes_on_from=first)
        while not bench.scheduler.idle:
            steps.append((list(bench.step().values()), bench.memory.n_used))
        for i in range(4):
            assert bench.answers[at + i] == answer_to(prompt, len(bench.answers[at + i]))
        bench.talk(at + 5, [*prompt[:500], 7])
        bench.talk(at + 6, prompt)
    assert jobs[0][:6] == [([100], n) for n in range(100, 700, 100)]
    assert jobs[0][6][0] == [1] * min(n_slots, 4), "all go on together"
    assert jobs[0] == jobs[1] == jobs[2]


def test_who_goes_on_from_one_that_is_gone_does_not_wait_for_it() -> None:
    prompt = tokens(1000, 90)
    bench = Bench(n_batch=40)
    bench.talk(9, prompt)  # known, and not to be taken
    bench.add(1, prompt, reuses=False)
    bench.add(2, prompt, n_wanted=2, rank=10.0, reuses=False, goes_on_from=1)
    bench.add(3, prompt, n_wanted=2, rank=20.0, reuses=False, goes_on_from=1)
    assert bench.step() == {1: 40}
    for failed in bench.scheduler.fail(bench.plan()):
        del bench.sequences[failed.id]
    n_decoded = bench.n_decoded
    bench.run()
    assert bench.n_decoded >= n_decoded + 89, "they compute it anew"
    assert bench.answers[2] == bench.answers[3] == answer_to(prompt, 2)


def test_answers_without_reuse_share_one_prefill_also_when_the_first_has_said_all() -> None:
    prompt = tokens(1000, 90)
    bench = Bench(n_slots=1)
    for i in range(3):
        first = 1 if i else None
        bench.add(1 + i, prompt, 1, rank=10.0 * i, reuses=False, goes_on_from=first)
    assert [bench.step() for _ in range(3)] == [{1: 90}, {2: 1}, {3: 1}]
