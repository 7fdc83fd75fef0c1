"""Which heads of cross-encoders are taken for trained ones."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from engine.backends.base import Ids, Interrupted
from engine.backends.fake import Script
from engine.backends.fake_encoder import FakeEncoder
from errors import ModelLoadFailed
from rerankers import PROOF, PROOF_MARGIN, BGEReranker, max_sim

Head = Callable[[str, str], float]


class Scripted(BGEReranker):
    """Scores as a function of the two texts says."""

    def __init__(self, head: Head) -> None:
        super().__init__(FakeEncoder(Script(), scores=True))
        self._head = head
        self._texts = {
            self.frame(query, document)[0].fit(self.encoder.n_ctx, "none")[0].tobytes(): (
                query,
                document,
            )
            for pairs in PROOF
            for query, _ in pairs
            for _, document in pairs
        }

    def score(self, batch: Sequence[Ids], go_on: Callable[[], bool] = lambda: True) -> list[float]:
        return [self._head(*self._texts[ids.tobytes()]) for ids in batch]


def is_taken(head: Head) -> bool:
    try:
        Scripted(head).prove()
    except ModelLoadFailed:
        return False
    return True


ANSWERS = [dict(pairs) for pairs in PROOF]


@pytest.mark.parametrize("language", [0, 1])
def test_a_head_that_tells_answers_apart_in_one_language_is_taken(language: int) -> None:
    answers = ANSWERS[language]
    assert is_taken(lambda query, text: 5 if answers.get(query) == text else -5)
    assert is_taken(lambda query, text: 0.9 if answers.get(query) == text else 0.1)


def test_of_random_heads_hardly_any_is_taken() -> None:
    taken = 0
    for seed in range(200):
        random = np.random.RandomState(seed)
        taken += is_taken(lambda *_, random=random: float(random.normal()))
    assert taken < 20


def test_a_head_that_looks_at_one_of_the_two_texts_is_not_taken() -> None:
    assert not is_taken(lambda query, text: sum(map(ord, text)))
    assert not is_taken(lambda query, text: sum(map(ord, query)))


def test_a_head_whose_scores_hardly_differ_is_not_taken() -> None:
    answers = {**ANSWERS[0], **ANSWERS[1]}
    near = PROOF_MARGIN / 2
    assert not is_taken(lambda query, text: near if answers[query] == text else 0)


def test_vectors_are_compared_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    query, document = (random.normal(size=(n, 4)).astype("f4") / 4 for n in (10, 7))
    whole, n_asked = max_sim(query, document), 0

    def go_on() -> bool:
        nonlocal n_asked
        n_asked += 1
        return n_asked < 6

    for products, n_slices in ((70, 1), (21, 4), (1, 10)):
        monkeypatch.setattr("rerankers.PRODUCTS_AT_ONCE", products)
        n_asked = -10
        assert max_sim(query, document, go_on) == pytest.approx(whole, abs=1e-6)
        assert n_asked + 10 == n_slices
    n_asked = 0
    with pytest.raises(Interrupted):
        max_sim(query, document, go_on)
    assert n_asked == 6
