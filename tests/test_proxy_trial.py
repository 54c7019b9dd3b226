"""The collapse screen, and one candidate's way through a trial."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from evo.types import Candidate, Origin, Status
from evo.worker import Worker
from fitness.objectives import losses, per_problem
from fitness.orderliness import Orderliness
from fitness.proxy.kriging import Kriging
from fitness.proxy.order import Order
from fitness.proxy.promise import Promise
from fitness.proxy.racing import Race
from fitness.proxy.screen import Screen, Trace
from fitness.proxy.trial import Answered, Trial, joined
from fitness.tasks.arithmetic import Arithmetic
from fitness.types import Likelihood, Score, Split, Verdict
from search_spaces.recipe import Recipe, Source
from tests.test_proxy_estimates import references


def score(verdicts, tokens, repeated=0.0):
    n = len(verdicts)
    column = np.array(tokens, np.int32).reshape(n, 1)
    return Score(
        tuple(map(str, range(n))),
        np.array(verdicts, np.uint8).reshape(n, 1),
        column,
        column * 0,
        {"repeated_ngrams": np.full((n, 1), repeated)},
    )


CUT, OK = Verdict.TRUNCATED, Verdict.CORRECT


@pytest.mark.parametrize(
    ("verdicts", "repeated", "ended", "collapsed"),
    [
        ([CUT] * 4, 0.9, [True] * 4, True),
        ([CUT] * 4, 0.1, [True] * 4, False),  # a long thought, no loop
        ([CUT, CUT, CUT, OK], 0.9, [True] * 4, False),
        ([CUT] * 4, 0.9, [False] * 4, False),  # nobody ends there
    ],
)
def test_a_loop_that_never_ends_is_collapse(verdicts, repeated, ended, collapsed):
    screen = Screen(4, np.array(ended))
    assert (screen.collapsed(score(verdicts, [99] * 4, repeated), np.arange(4)) is not None) == collapsed


def test_the_screen_looks_only_at_problems_where_a_reference_ended():
    """The second and the fourth asked, which run on; the others say nothing of a collapse."""
    screen = Screen(2, np.array([False, False, True, True]))
    asked = score([OK, CUT, OK, CUT], [9, 99, 9, 99])
    asked.orderliness["repeated_ngrams"][[1, 3]] = 0.9
    assert "first 2 problems ends, 90% of their n-grams" in screen.collapsed(asked, np.array([0, 2, 1, 3]))


class Uniform:
    """An engine that finds every token equally (un)likely."""

    def __init__(self, nats):
        self.nats = nats

    def log_likelihood(self, prompts, completions):
        return [Likelihood(self.nats[c] * 10, 10, -4.0) for c in completions]


@pytest.mark.parametrize(
    ("nats", "dead"),
    [
        ({"a": -0.1, "b": -3.9}, False),  # it is like one parent
        ({"a": -2.1, "b": -3.9}, True),
        ({"a": float("nan"), "b": float("nan")}, True),
    ],
)
def test_likelihood_of_the_parents_answers(nats, dead):
    screen = Screen(0, np.ones(4, bool), (Trace("a", "1+1", "a"), Trace("b", "1+1", "b")))
    reason, n_forced = screen.unlikely(Uniform(nats))
    assert (reason is not None) == dead and n_forced == 20


def trial(member, *, racing=True, screen=0, first=8, tolerance=0.01, enough=0.0, before=None):
    n = len(member)
    order = Order(np.arange(n)[::-1].copy(), 0, np.ones(n))
    race = Race(order, np.array([tolerance, tolerance * 100]), np.zeros((n, 2)), 0.1)
    promise = Promise(member.mean(axis=0)[None], np.array([1.0, 128.0]), np.full(2, np.inf))
    return Trial(
        ("error", "tokens"), race, racing, Screen(screen, np.ones(n, bool)), Kriging(references(5, n)), (7,),
        member[None], np.array([1.0, 128.0]), first, promise, enough, before,
    )  # fmt: skip


def run(trial, verdicts, tokens, repeated=0.0):
    """A candidate's way through a trial: the stop, and how many problems it was asked."""
    parts, asked = [], np.zeros(0, int)
    for block in trial.blocks():
        parts.append(score(np.array(verdicts)[block], np.array(tokens)[block], repeated))
        asked = np.concatenate([asked, block])
        if stop := trial.judge(joined(parts), asked):
            return stop, len(asked)
    return None, len(asked)


def test_a_stopped_candidate_is_never_told_better_than_its_member():
    member = np.stack([np.zeros(64), np.full(64, 30.0)], axis=1)
    stop, n = run(trial(member), [Verdict.WRONG] * 64, [90] * 64)
    assert stop.member == 7 and n < 64
    assert (stop.losses >= member.mean(axis=0)).all() and stop.losses[0] > 0.5
    assert stop.reason == f"cannot beat candidate 7, after {n} of 64 problems"
    briefer, _ = run(trial(member, tolerance=0.5), [OK] * 64, [25] * 64)  # by less than the tolerance
    assert briefer.losses == pytest.approx(member.mean(axis=0))


def test_a_twin_is_estimated_as_its_member_whatever_problems_were_seen():
    member, some = references(2, 64, seed=9)[1], np.arange(5)
    rules = trial(member)
    assert rules.estimator.estimate(some, member[some]) != pytest.approx(member.mean(axis=0))
    assert rules.paired(member[some], some, member) == pytest.approx(member.mean(axis=0))


def test_cut_off_answers_count_as_wrong_and_as_the_limit_through_the_proxy():
    member = np.stack([np.arange(64) % 8 == 0, np.full(64, 30.0)], axis=1).astype(float)
    stop, n = run(trial(member), [CUT] * 64, [128] * 64)
    assert stop is not None and stop.member == 7 and n < 64
    assert stop.losses[0] > 0.5 and stop.losses[1] > 60


def test_a_candidate_that_has_answered_everything_is_not_stopped():
    member = np.stack([np.zeros(64), np.full(64, 30.0)], axis=1)
    assert run(trial(member), [OK] * 64, [25] * 64) == (None, 64)
    assert run(trial(member, first=64), [Verdict.WRONG] * 64, [90] * 64) == (None, 64)


def test_nobody_is_parked_where_nothing_has_to_be_promised():
    member = np.stack([np.zeros(64), np.full(64, 30.0)], axis=1)
    hopeless = Promise(np.zeros((1, 2)), np.array([1.0, 128.0]), np.full(2, np.inf))
    assert run(replace(trial(member, tolerance=0.0), promise=hopeless), [OK] * 64, [30] * 64) == (None, 64)


def test_a_screen_adds_a_block_only_before_the_first_look():
    member = np.stack([np.zeros(64), np.full(64, 30.0)], axis=1)
    sizes = {n: [len(block) for block in trial(member, screen=n).blocks()] for n in (0, 4, 8, 9)}
    plain = [8, 8, 16, 32]
    assert sizes == {0: plain, 4: [4, 4, 8, 16, 32], 8: plain, 9: plain}


def test_all_are_parked_at_the_first_look_where_nothing_is_enough():
    member = np.stack([np.arange(64) % 2, np.full(64, 30.0)], axis=1).astype(float)
    for screen in (0, 4):  # which is no look
        rules = trial(member, enough=np.inf, screen=screen)
        stop, n = run(rules, [OK] * 64, [25] * 64)
        seen = np.stack([np.zeros(8), np.full(8, 25.0)], axis=1)
        assert n == 8 and stop.member is None and stop.promise > 0.1
        assert stop.losses == pytest.approx(rules.estimator.estimate(rules.race.order.problems[:8], seen))


def test_a_parked_candidate_goes_on_from_where_it_was_and_only_while_it_promises():
    member = np.stack([np.arange(64) % 2, np.full(64, 30.0)], axis=1).astype(float)
    asked = np.arange(64)[::-1][:8]
    for verdict, tokens, whole in ((OK, 25, True), (Verdict.WRONG, 31, False)):  # as it began, or failing
        before = Answered(score([OK] * 8, [25] * 8), asked)
        rules = trial(member, enough=0.01, before=before, racing=False)
        blocks = rules.blocks()
        assert np.concatenate([asked, *blocks]).tolist() == rules.race.order.problems.tolist() and len(blocks[0]) == 8
        parts, n, stop = [before.score], 8, None
        for block in blocks:
            parts.append(score([verdict] * len(block), [tokens] * len(block)))
            n += len(block)
            if stop := rules.judge(joined(parts), rules.race.order.problems[:n]):
                break
        assert (stop is None) == whole == (n == 64)
        assert whole or stop.promise < 0.01


class Silent:
    """An engine that is asked nothing."""

    def host(self, writer, **arguments):
        pass

    def room(self, prompts):
        return None

    def update(self, recipe):
        return SimpleNamespace(seconds=0.0, n_written=1, n_skipped=0, n_compiled=0, delta_errors={})


def test_a_parked_candidate_that_a_new_member_beats_is_asked_nothing_more():
    member, asked = np.stack([np.zeros(64), np.full(64, 30.0)], axis=1), np.arange(64)[::-1][:32]
    rules = trial(member, enough=0.01, before=Answered(score([Verdict.WRONG] * 32, [90] * 32), asked))
    limits = {"max_tokens": 128, "objectives": ("error", "tokens"), "orderliness": Orderliness()}
    worker = Worker(Silent(), Arithmetic(search=64), {}, **limits)
    candidate = Candidate(9, "c9", Origin.SEARCH, 1, Recipe({"a": Source("a")}, "a", "a"))
    found = worker.evaluate(candidate, Split.SEARCH, trial=rules)
    assert (found.status, found.detail["stopped_by"]) == (Status.PARTIAL, 7)
    assert found.detail["problems"] == asked.tolist() and found.detail["n_before"] == found.score.n_generated


def test_the_parts_can_be_switched_off():
    member = np.stack([np.zeros(64), np.full(64, 30.0)], axis=1)
    assert run(trial(member, racing=False), [Verdict.WRONG] * 64, [90] * 64) == (None, 64)
    stop, n = run(trial(member, racing=False, screen=4), [CUT] * 64, [128] * 64, repeated=0.9)
    assert n == 4 and stop.member is None and stop.losses.tolist() == [1.0, 128.0]


def test_losses_of_problems_average_to_the_losses():
    s = score([OK, CUT, Verdict.WRONG, OK], [5, 99, 20, 7])
    assert per_problem(s, ("error", "tokens")).mean(axis=0) == pytest.approx(losses(s, ("error", "tokens")))
    assert s.take(np.array([2, 0])).n_tokens.ravel().tolist() == [20, 5]
