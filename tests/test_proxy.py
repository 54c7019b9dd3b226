"""The proxy's mathematics: against closed forms, brute force, simulation, and an independent library's regression."""

import itertools
import pkgutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evo.pareto import Scale
from fitness.objectives import losses, per_problem
from fitness.proxy import ESTIMATORS
from fitness.proxy.betting import BETS, evidence
from fitness.proxy.irt import ItemResponse
from fitness.proxy.kriging import NUGGET, UNDERSTATED, Kriging, informative
from fitness.proxy.order import Order, choose
from fitness.proxy.promise import Promise
from fitness.proxy.racing import Race, looks
from fitness.proxy.screen import Screen, Trace
from fitness.proxy.trial import Answered, Trial, joined
from fitness.types import Likelihood, Score, Verdict

RNG = np.random.default_rng(0)


def references(n_models=7, n_problems=30, seed=0):
    """Models between two extremes: abler ones write more. (R, P, 2)."""
    rng = np.random.default_rng(seed)
    ability, hardness = np.linspace(-1, 1, n_models)[:, None], rng.normal(size=n_problems)
    wrong = (rng.random((n_models, n_problems)) > 1 / (1 + np.exp(-3 * (ability - hardness)))).astype(float)
    tokens = np.round(20 + 10 * (ability + 1) * rng.uniform(0.5, 1.5, n_problems))
    return np.stack([wrong, tokens], axis=2)


def plain_order(n_problems, n_chosen=0, seed=0):
    problems = np.random.default_rng(seed).permutation(n_problems)
    return Order(problems, n_chosen, np.ones(n_problems - n_chosen))


# -- the test ---------------------------------------------------------------------------------------------------


def all_orders(n, weights):
    """Every order of a weighted draw without replacement, with its probability."""
    for order in itertools.permutations(range(n)):
        p, left = 1.0, sum(weights)
        for j in order:
            p, left = p * weights[j] / left, left - weights[j]
        yield list(order), p


@pytest.mark.parametrize("paired", [[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.5, 2.0]])
def test_wealth_is_fair_under_the_null_by_enumeration(paired):
    """E[W] = 1 where the losses add up to the bar exactly: each of 24 orders, weighted by its probability."""
    from fitness.proxy.betting import _wealth

    losses, weights = np.array([0.0, 1.0, 0.3, 2.0]), np.array([1.0, 2.0, 0.5, 3.0])
    bar, h = np.array([losses.sum()]), np.array([paired])
    for n in (1, 2, 3):
        found = [(_wealth(losses[o][:n], weights[o], bar, h[:, o])[0, -1], p) for o, p in all_orders(4, weights)]
        # A bet is skipped only where no room is left, which loses nothing on average.
        assert sum(w * p for w, p in found) == pytest.approx(1.0, abs=1e-9)
        assert min(w for w, _ in found) >= 0.0


def test_a_bar_that_is_reached_is_refuted_with_at_most_alpha():
    rng, alpha, refuted = np.random.default_rng(1), 0.1, 0
    population = rng.random(60) < 0.4
    for _ in range(600):
        order = rng.permutation(60)
        x = population[order].astype(float)
        h = (rng.random(60) < 0.4).astype(float)[None]
        refuted += evidence(x[:40], np.ones(60), np.array([x.sum()]), h)[0] >= 1 / alpha
    assert refuted / 600 <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / 600)


def test_the_test_has_power_and_pairing_adds_to_it():
    rng, found = np.random.default_rng(2), {"paired": 0, "apart": 0}
    for _ in range(100):
        member = (rng.random(300) < 0.4).astype(float)
        worse = np.where(rng.random(300) < 0.15, 1.0, member)
        bar = np.array([member.sum() - 3])
        for name, h in (("paired", member[None]), ("apart", np.zeros((1, 300)))):
            found[name] += evidence(worse[:100], np.ones(300), bar, h)[0] >= 20
    assert found["paired"] > 60 and found["paired"] > found["apart"] + 20


def test_wealth_of_one_bet_by_hand():
    # First draw of 4 even ones, bar 2: Z = 4 x, so the factor is 1 + lambda (4 x - 2) / 2.
    gained = np.mean([1 + b * (4 * 1.0 - 2) / 2 for b in BETS])
    assert evidence(np.array([1.0]), np.ones(4), np.array([2.0]), np.zeros((1, 4)))[0] == pytest.approx(gained)
    assert evidence(np.array([1.0]), np.ones(4), np.array([0.5]), np.zeros((1, 4)))[0] == np.inf
    assert evidence(np.zeros(0), np.ones(4), np.array([2.0]), np.zeros((1, 4)))[0] == 1.0


# -- the race ---------------------------------------------------------------------------------------------------


def race_between(candidate, member, *, tolerance=(0.0, 0.0), floor=None, n_chosen=0, alpha=0.05):
    n = len(member)
    order = plain_order(n, n_chosen)
    race = Race(order, np.array(tolerance), np.zeros((n, 2)) if floor is None else floor, alpha)
    return [race.beaten_by(candidate[order.problems[:k]], member[None]) for k in (16, 64, n - 1)]


def test_a_candidate_that_is_worse_in_both_is_stopped_and_one_that_is_better_in_one_is_not():
    member = np.stack([np.arange(128) % 4 == 0, np.full(128, 30.0)], axis=1).astype(float)
    worse, briefer, abler = member.copy(), member.copy(), member.copy()
    worse[::2, 0], worse[:, 1] = 1.0, 60.0
    briefer[:, 0], briefer[:, 1] = 1.0, 20.0
    abler[:, 0], abler[:, 1] = 0.0, 90.0
    assert race_between(worse, member)[1] == 0
    assert race_between(briefer, member) == [None, None, None]
    assert race_between(abler, member) == [None, None, None]


def test_one_member_must_beat_it_in_both_objectives():
    """A brief bad member and a wordy good one each beat it in one objective, and neither in both."""
    n = 128
    brief = np.stack([np.ones(n), np.full(n, 10.0)], axis=1)
    wordy = np.stack([np.zeros(n), np.full(n, 90.0)], axis=1)
    between = np.stack([np.arange(n) % 2, np.full(n, 50.0)], axis=1).astype(float)
    race = Race(plain_order(n), np.zeros(2), np.zeros((n, 2)), 0.05)
    for k in (16, 64, 127):
        assert race.beaten_by(between[race.order.problems[:k]], np.array([brief, wordy])) is None


def test_the_floor_settles_a_tie_and_a_candidate_below_it_is_raced_without():
    member = np.stack([np.zeros(256), np.full(256, 30.0)], axis=1)
    twin, floor = member.copy(), np.stack([np.zeros(256), np.full(256, 30.0)], axis=1)
    assert race_between(twin, member, tolerance=(0.01, 1.0), floor=floor)[0] == 0
    assert race_between(twin, member, tolerance=(0.01, 1.0))[0] is None
    twin[:, 1] = 29.9
    assert race_between(twin, member, tolerance=(0.01, 1.0), floor=floor)[0] is None


def test_random_candidates_that_beat_every_member_are_rarely_stopped():
    rng, stopped, n = np.random.default_rng(3), 0, 100
    for i in range(300):
        member = np.stack([rng.random(n) < 0.3, rng.integers(20, 60, n)], axis=1).astype(float)
        better = member[rng.permutation(n)]
        better[rng.choice(n, 4, replace=False), 1] -= 10  # 0.4 tokens briefer, with the same accuracy
        order = plain_order(n, seed=i)
        race = Race(order, np.zeros(2), np.zeros((n, 2)), 0.1)
        stopped += any(race.beaten_by(better[order.problems[:k]], member[None]) is not None for k in looks(16, n)[:-1])
    assert stopped / 300 <= 0.1


def test_looks_grow_and_end_with_the_split():
    assert looks(16, 100) == [16, 32, 64, 100]
    assert looks(16, 10) == [10]
    assert looks(1, 4) == [1, 2, 4]


# -- chosen problems and estimates ------------------------------------------------------------------------------


def covariance_of(x):
    """Of the problems, over references (R, P), as the module's docstring has it."""
    k = np.cov(x.T)
    return k + NUGGET * np.trace(k) / len(k) * np.eye(len(k))


def test_kriging_is_the_conditional_mean_of_a_gaussian():
    """Against the textbook formula over all problems, summed up one by one."""
    found = references(n_problems=12)
    seen = np.array([3, 7, 1])
    observed = RNG.random((3, 2)) * [1, 30]
    for m, estimate in enumerate(Kriging(found).estimate(seen, observed)):
        x = found[:, :, m]
        k = covariance_of(x)
        everything = x.mean(0) + k[:, seen] @ np.linalg.inv(k[np.ix_(seen, seen)]) @ (observed[:, m] - x.mean(0)[seen])
        assert estimate == pytest.approx(everything.mean(), rel=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_know_what_they_have_seen(name):
    """With every problem seen, the estimate is the mean; with the references' own problems, close to it."""
    found = references()
    estimator = pkgutil.resolve_name(ESTIMATORS[name])(found, 2, ("error", "tokens"))
    child = 0.5 * found[2] + 0.5 * found[3]
    assert estimator.estimate(np.arange(30), child) == pytest.approx(child.mean(axis=0), rel=1e-3)
    some = np.arange(0, 30, 2)
    error, tokens = estimator.estimate(some, child[some])
    assert abs(error - child[:, 0].mean()) < 0.15
    assert tokens == pytest.approx(child[:, 1].mean(), rel=0.1)


def test_the_deviation_of_kriging_is_that_of_a_gaussian_whose_scale_the_candidate_sets():
    """Against the textbook formula over all problems: conditional covariance, summed; the scale by likelihood."""
    found = references(n_problems=12)
    seen = np.array([3, 7, 1])
    observed = RNG.random((3, 2)) * [1, 30]
    for m, deviation in enumerate(Kriging(found).deviation(seen, observed)):
        x = found[:, :, m]
        k = covariance_of(x)
        inverse, away = np.linalg.inv(k[np.ix_(seen, seen)]), observed[:, m] - x.mean(0)[seen]
        left = k - k[:, seen] @ inverse @ k[seen]
        expected = np.sqrt(left.sum() / 144 * (away @ inverse @ away) / 3)
        assert deviation == pytest.approx(UNDERSTATED * expected, rel=1e-6)


def test_deviations_vanish_with_every_problem_seen_and_cover_what_is_true():
    everyone = references(26, 200, seed=5)
    found, children = everyone[::6], everyone[np.arange(26) % 6 > 0]
    for name in ESTIMATORS:
        estimator = pkgutil.resolve_name(ESTIMATORS[name])(found, 2, ("error", "tokens"))
        assert estimator.deviation(np.arange(200), children[3]) == pytest.approx(0.0, abs=1e-6)
        some = choose(found, 16, 0).problems[:40]
        off = [abs(estimator.estimate(some, c[some]) - c.mean(axis=0)) for c in children]
        said = [estimator.deviation(some, c[some]) for c in children]
        assert (np.array(off) < 2 * np.array(said) + 1e-9).mean(axis=0).min() > 0.8, name


def test_item_response_recovers_ability_on_data_of_its_own_model():
    rng = np.random.default_rng(4)
    slopes, hardness = rng.uniform(0.8, 2, 400), rng.normal(size=400)

    def errors(ability):
        return (rng.random(400) > 1 / (1 + np.exp(-(slopes * ability - hardness)))).astype(float)

    found = np.array([errors(a) for a in (-2, 2, -1.2, -0.5, 0, 0.5, 1.2)])[:, :, None]
    estimator, some = ItemResponse(found, 2, ("error",)), rng.choice(400, 60, replace=False)
    for ability in (-1.0, 0.0, 1.0):
        child = errors(ability)
        estimate = estimator.estimate(some, child[some, None])[0]
        assert abs(estimate - child.mean()) < 0.1


def test_the_first_problem_chosen_is_the_one_that_correlates_most_by_brute_force():
    found = references()
    chosen, left = informative(found, 1)

    def variance_left(j):
        total = 0.0
        for m in range(2):
            k = covariance_of(found[:, :, m])
            total += (k - np.outer(k[j], k[j]) / k[j, j]).sum() / k.sum()
        return total

    assert chosen[0] == min(range(30), key=variance_left)
    assert left[chosen[0]] == pytest.approx(0.0, abs=1e-6)


def test_chosen_problems_predict_better_than_as_many_at_random():
    found, children = references(9, 200, seed=5), references(41, 200, seed=5)
    estimator, rng = Kriging(found), np.random.default_rng(0)

    def error(problems):
        return np.mean([abs(estimator.estimate(problems, c[problems]) - c.mean(0)) / c.mean(0) for c in children])

    assert error(choose(found, 12, 0).problems[:12]) < np.mean([error(rng.permutation(200)[:12]) for _ in range(10)])


@given(st.integers(2, 40), st.integers(0, 50), st.integers(0, 5))
def test_an_order_asks_every_problem_once(n_problems, n_chosen, seed):
    order = choose(references(4, n_problems), n_chosen, seed)
    assert sorted(order.problems) == list(range(n_problems))
    assert len(order.weights) == n_problems - order.n_chosen and (order.weights > 0).all()


def test_the_draw_follows_its_weights():
    found = references(6, 8)
    firsts = [choose(found, 0, seed).problems[0] for seed in range(4000)]
    order = choose(found, 0, 0)
    weights = np.zeros(8)
    weights[order.problems] = order.weights / order.weights.sum()
    assert np.bincount(firsts, minlength=8) / 4000 == pytest.approx(weights, abs=0.03)


# -- the screen and one candidate's trial -----------------------------------------------------------------------


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


def test_cut_off_answers_count_as_wrong_and_as_the_limit_through_the_proxy():
    member = np.stack([np.arange(64) % 8 == 0, np.full(64, 30.0)], axis=1).astype(float)
    stop, n = run(trial(member), [CUT] * 64, [128] * 64)
    assert stop is not None and stop.member == 7 and n < 64
    assert stop.losses[0] > 0.5 and stop.losses[1] > 60


def test_a_candidate_that_has_answered_everything_is_not_stopped():
    member = np.stack([np.zeros(64), np.full(64, 30.0)], axis=1)
    assert run(trial(member), [OK] * 64, [25] * 64) == (None, 64)
    assert run(trial(member, first=64), [Verdict.WRONG] * 64, [90] * 64) == (None, 64)


def test_all_are_parked_at_the_first_look_where_nothing_is_enough():
    member = np.stack([np.arange(64) % 2, np.full(64, 30.0)], axis=1).astype(float)
    rules = trial(member, enough=np.inf)
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


# -- what a candidate promises ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_objectives", [1, 2, 3])
def test_a_promise_is_the_mean_gain_of_hypervolume_of_many_draws(n_objectives):
    """By Monte Carlo, with moocore's hypervolume."""
    rng, box = np.random.default_rng(n_objectives), np.array([1.0, 90.0, 5.0])[:n_objectives]
    scale, limits = Scale(np.zeros(n_objectives), box), np.array([0.7, np.inf, np.inf])[:n_objectives]
    front = (rng.random((6, n_objectives)) * 0.6 + 0.3) * box
    mean, deviation = rng.random((5, n_objectives)) * 0.6 * box, rng.random((5, n_objectives)) * 0.1 * box
    already = scale.hypervolume(front)
    for found, m, d in zip(Promise(front, box, limits).of(mean, deviation), mean, deviation, strict=True):
        draws = m + d * rng.normal(size=(4000, n_objectives))
        gains = [scale.hypervolume([*front, np.maximum(draw, 0)]) - already for draw in draws]
        feasible = (draws <= limits).all(axis=1).mean()
        error = np.std(gains) / np.sqrt(len(gains)) + 0.01 * np.mean(gains)
        assert found == pytest.approx(np.mean(gains) * feasible, abs=4 * error + 1e-9)


def test_what_is_certain_gains_what_it_covers_alone():
    front, box = np.array([[0.5, 40.0], [0.2, 80.0]]), np.array([1.0, 100.0])
    points = np.array([[0.1, 60.0], [0.6, 50.0], [0.5, 40.0], [0.9, 10.0]])
    found = Promise(front, box, np.full(2, np.inf)).of(points, np.zeros((4, 2)))
    assert found == pytest.approx([0.4 * 0.2 + 0.1 * 0.2, 0.0, 0.0, 0.1 * 0.3])
    assert Promise(np.zeros((0, 2)), box, np.full(2, np.inf)).of(points[:1], np.zeros((1, 2))) == pytest.approx([0.36])


def test_the_parts_can_be_switched_off():
    member = np.stack([np.zeros(64), np.full(64, 30.0)], axis=1)
    assert run(trial(member, racing=False), [Verdict.WRONG] * 64, [90] * 64) == (None, 64)
    stop, n = run(trial(member, racing=False, screen=4), [CUT] * 64, [128] * 64, repeated=0.9)
    assert n == 4 and stop.member is None and stop.losses.tolist() == [1.0, 128.0]


def test_losses_of_problems_average_to_the_losses():
    s = score([OK, CUT, Verdict.WRONG, OK], [5, 99, 20, 7])
    assert per_problem(s, ("error", "tokens")).mean(axis=0) == pytest.approx(losses(s, ("error", "tokens")))
    assert s.take(np.array([2, 0])).n_tokens.ravel().tolist() == [20, 5]
