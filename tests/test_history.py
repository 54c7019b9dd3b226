"""A run as it stands: what of its budget is used, and what is kept once for all sittings."""

import logging
from contextlib import closing

import numpy as np
import pytest

from evo.history import History
from evo.ledger import Ledger
from evo.types import Candidate, Evaluation, Origin, Status
from fitness.types import Score, Split
from search_spaces.recipe import Recipe, Source

PROBLEMS = {Split.SEARCH: ["p1", "p2"], Split.RESERVE: ["r"], Split.HELD_OUT: ["h1", "h2"]}
RECIPE = Recipe({"a": Source("/a")}, "a", "a")


@pytest.fixture
def ledger(tmp_path):
    budget = {"candidates": 10, "tokens": 1000, "hours": 0.5}
    with closing(
        Ledger.create(tmp_path, {"config": {"objectives": ["error", "tokens"]}, "budget": budget}, PROBLEMS)
    ) as made:
        yield made


def evaluation(i, seconds, n_tokens, split=Split.SEARCH, status=Status.DONE):
    tokens = np.array([[n_tokens - 1], [1]], np.int32)
    score = Score(tuple(PROBLEMS[split]), np.zeros((2, 1), np.uint8), tokens, tokens * 0)
    return Evaluation(i, status, seconds, losses=np.array([0.5, n_tokens / 2]), score=score)


def test_a_budget_is_used_by_all_evaluations_on_the_search_split(ledger):
    """An hour has 3,600 seconds; what is evaluated further is no further candidate, and held-out scores are free."""
    history = History(ledger)
    assert history.share_spent() == 0.0 and not history.exhausted
    history.append_asks([Candidate(i, f"c{i}", Origin.SEARCH, 0, RECIPE) for i in range(3)])
    for i in range(3):
        history.append_evaluation(evaluation(i, 90.0, 50), Split.SEARCH)
    history.append_evaluation(evaluation(0, 9000.0, 5000, Split.HELD_OUT), Split.HELD_OUT)
    assert [row.held_out and row.held_out.n_tokens for row in history.front.evaluated] == [5000, None, None]
    history.append_later(evaluation(1, 270.0, 250), "in full")
    for known in (history, History(ledger)):  # as it goes, and read anew
        assert known.spent == {"candidates": 3, "tokens": 400, "hours": pytest.approx(0.15)}
        assert known.share_spent() == pytest.approx(0.4)  # of the tokens, the nearest limit
        assert known.share_spent("candidates", "hours") == pytest.approx(0.3)
        assert known.share_spent("hours") == pytest.approx(0.3) and known.share_spent("candidates") == 0.3
        assert known.latest(1).n_tokens == 250 and known.latest(0).n_tokens == 50
        assert not known.exhausted
    history.append_later(evaluation(2, 0.0, 600), "in full")
    assert history.share_spent() == 1.0 and history.exhausted


def test_the_first_batch_size_and_caveat_are_kept(ledger, caplog):
    history = History(ledger)
    history.keep_batch_size(None)
    history.keep_caveat(None)
    assert history.batch_size is None and ledger.meta("caveat") is None
    with caplog.at_level(logging.WARNING, "mergefront"):
        for size, caveat in ((16, "scores depend on the batch"), (8, "something else")):
            history.keep_batch_size(size)
            history.keep_caveat(caveat)
    assert history.batch_size == 16 and ledger.meta("caveat") == "scores depend on the batch"
    assert caplog.messages == ["scores depend on the batch"]


def test_why_a_search_ended_is_kept_until_it_goes_on(ledger):
    history = History(ledger)
    history.keep_ended("nothing left to try")
    assert History(ledger).ended == "nothing left to try"
    history.keep_ended(None)
    assert History(ledger).ended is None
