"""A run told generation by generation: figures by hand, and whether it has ended."""

from contextlib import closing

import numpy as np
import pytest

from evo.ledger import Ledger
from evo.tracking.generations import Record
from evo.types import Candidate, Evaluation, Origin, Status
from fitness.types import Score, Split, Verdict
from search_spaces.recipe import Recipe, Source

RECIPE = Recipe({"a": Source("/a")}, "a", "a")
PROBLEMS = {Split.SEARCH: ["p1", "p2"], Split.RESERVE: ["r"], Split.HELD_OUT: ["h1", "h2"]}
BUDGET = {"candidates": 9, "tokens": 10**6}


def done(i, n_correct, tokens, split=Split.SEARCH, **changes):
    """Asked both problems, of which the first so many are solved."""
    verdicts = np.array([[Verdict.CORRECT]] * n_correct + [[Verdict.WRONG]] * (2 - n_correct), np.uint8)
    n_tokens = np.full((2, 1), tokens, np.int32)
    values = {"losses": np.array([1 - n_correct / 2, tokens]), "score": Score((), verdicts, n_tokens, n_tokens)}
    return Evaluation(i, Status.DONE, 1.0, **{**values, **changes})


def partial(i, losses, n_saved, violations=None, **detail):
    detail = {"stopped_by": None, "n_saved": n_saved, **detail}
    score = done(i, 0, 99).score
    return Evaluation(i, Status.PARTIAL, 1.0, np.array(losses), violations or {}, score, detail)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    """A parent and a baseline; a generation with one parked, one that went on, one stopped, one collapsed; another."""
    meta = {"config": {"objectives": ["error", "tokens"]}, "budget": BUDGET}
    with closing(Ledger.create(tmp_path_factory.mktemp("run"), meta, PROBLEMS)) as made:

        def ask(generation, ids, origin=Origin.SEARCH):
            made.append_asks([Candidate(i, f"c{i}", origin, generation, RECIPE) for i in ids])

        ask(0, (0,), Origin.PARENT)
        ask(0, (1,), Origin.BASELINE)
        batches = [
            [done(0, 2, 50), done(1, 1, 35)],
            [
                done(2, 2, 40),
                partial(3, (0.25, 30), 100, promise=0.2),
                partial(4, (0.5, 24), 200, {"accuracy": 0.1}, promise=0.1),
                partial(5, (0.5, 60), 40, stopped_by=2),
                partial(6, (1.0, 110), 5, {"collapsed": 1.0}),
            ],
            [Evaluation(7, Status.FAILED, 1.0, detail={"reason": "no"}), done(8, 1, 15)],
        ]
        for generation, batch in enumerate(batches):
            if generation:
                ask(generation, [evaluation.candidate_id for evaluation in batch])
            for evaluation in batch:
                made.append_evaluation(evaluation, Split.SEARCH)
            if generation == 1:
                made.append_evaluation(done(3, 1, 30), Split.SEARCH, again="in full")
        yield made


def test_what_goes_on_belongs_to_the_generation_in_which_it_does(ledger):
    _, first, last = Record.read(ledger).generations(running=False)
    expected = {
        "gen/failed": 0, "gen/feasible_share": 2 / 3, "gen/accuracy_mean": 0.75, "gen/accuracy_max": 1.0,
        "gen/tokens_mean": 35, "gen/tokens_min": 30, "proxy/parked": 1, "proxy/stopped": 1, "proxy/collapsed": 1,
        "proxy/tokens_saved": 245, "proxy/error_mean": 0.5, "proxy/tokens_mean": 24,
    }  # fmt: skip
    assert {key: first.metrics[key] for key in expected} == pytest.approx(expected)
    assert first.time == ledger.later()[0].time
    assert (last.metrics["gen/failed"], last.metrics["gen/feasible_share"]) == (1, 0.5)
    assert last.metrics["proxy/parked"] == last.metrics["proxy/collapsed"] == 1  # of all so far
    assert [row.ask.id for row in last.front.evaluated] == [0, 1, 2, 3, 8]
    assert [row.ask.id for row in last.front.baselines] == [1]  # though no member any more


def test_a_generation_ends_when_nobody_before_it_can_go_on(ledger):
    assert [generation.index for generation in Record.read(ledger).generations(running=True)] == [0, 1]
    ended = [generation.complete for generation in Record.read(ledger).generations(running=False)]
    assert ended == [True, True, False]  # a larger budget may let who is parked go on


def test_a_search_has_ended_by_any_of_its_limits_or_with_everything_scored(ledger):
    def finished(**limits):
        ledger.set_meta("budget", {**BUDGET, "candidates": 100, **limits})
        return Record.read(ledger).finished

    assert [finished(), finished(candidates=9), finished(tokens=100), finished(hours=1)] == [False, True, True, False]
    shown = [row.ask.id for row in Record.read(ledger).front.unscored()]
    for i in shown:
        assert not finished()
        ledger.append_evaluation(done(i, 1, 20), Split.HELD_OUT)
    assert finished() and Record.read(ledger).last_time == ledger.entries(Split.HELD_OUT)[-1].time
