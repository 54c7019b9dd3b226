"""Chosen problems and estimates from them: against closed forms, brute force and data of a model of its own."""

import pkgutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitness.proxy import ESTIMATORS
from fitness.proxy.irt import ItemResponse
from fitness.proxy.kriging import NUGGET, UNDERSTATED, Kriging, informative
from fitness.proxy.order import UNIFORM, choose

RNG = np.random.default_rng(0)


def references(n_models=7, n_problems=30, seed=0):
    """Models between two extremes: abler ones write more. (R, P, 2)."""
    rng = np.random.default_rng(seed)
    ability, hardness = np.linspace(-1, 1, n_models)[:, None], rng.normal(size=n_problems)
    wrong = (rng.random((n_models, n_problems)) > 1 / (1 + np.exp(-3 * (ability - hardness)))).astype(float)
    tokens = np.round(20 + 10 * (ability + 1) * rng.uniform(0.5, 1.5, n_problems))
    return np.stack([wrong, tokens], axis=2)


def covariance_of(x):
    """Of the problems, over references (R, P), as the module's docstring has it."""
    k = np.cov(x.T)
    return k + NUGGET * np.trace(k) / len(k) * np.eye(len(k))


def test_kriging_is_the_conditional_mean_of_a_gaussian():
    """Against the textbook formula over all problems, summed up one by one."""
    found = references(n_problems=12)
    kriging = Kriging(found)
    for seen in (np.array([3, 7, 1]), np.array([4, 11, 0])):
        observed = RNG.random((3, 2)) * [1, 30]
        for m, estimate in enumerate(kriging.estimate(seen, observed)):
            x = found[:, :, m]
            k, away = covariance_of(x), observed[:, m] - x.mean(0)[seen]
            everything = x.mean(0) + k[:, seen] @ np.linalg.inv(k[np.ix_(seen, seen)]) @ away
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


def test_the_deviation_of_item_response_is_that_of_a_sample_without_replacement():
    """Two problems of three: their means over all three samples scatter by it, on average of the squares."""
    everything = np.array([[0.0, 10.0], [1.0, 25.0], [1.0, 70.0]])
    estimator = ItemResponse(references(5, 3), 2, ("error", "tokens"))
    samples = [np.array(pair) for pair in ([0, 1], [0, 2], [1, 2])]
    scatter = np.var([everything[some].mean(axis=0) for some in samples], axis=0)
    said = [estimator.deviation(some, everything[some]) ** 2 for some in samples]
    assert np.mean(said, axis=0) == pytest.approx(scatter)


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
    assert len(order.weights) == n_problems - order.n_chosen
    assert (order.weights > UNIFORM / max(1, len(order.weights))).all()  # an even share, and more


def test_the_draw_follows_its_weights():
    found = references(6, 8)
    firsts = [choose(found, 0, seed).problems[0] for seed in range(4000)]
    order = choose(found, 0, 0)
    weights = np.zeros(8)
    weights[order.problems] = order.weights / order.weights.sum()
    assert np.bincount(firsts, minlength=8) / 4000 == pytest.approx(weights, abs=0.03)


@pytest.mark.parametrize("seed", range(4))
def test_of_problems_that_tie_the_first_is_chosen_however_a_cpu_rounds(seed):
    """Right and wrong alone make many ties, which the last bits of linear algebra would settle."""
    rng = np.random.default_rng(seed)
    wrong = (rng.random((5, 256, 1)) < 0.5).astype(float)
    chosen, _ = informative(wrong, 32)
    assert np.array_equal(chosen, informative(wrong + rng.normal(scale=1e-13, size=wrong.shape), 32)[0])
