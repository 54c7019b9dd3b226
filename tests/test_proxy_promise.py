"""What a candidate promises: against many draws and an independent hypervolume."""

import numpy as np
import pytest

from evo.pareto import Scale
from fitness.proxy.promise import Promise


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
    outside = np.array([[0.5, 40.0], [0.2, 120.0]])  # of the box, where the second adds nothing and takes nothing
    found = Promise(outside, box, np.full(2, np.inf)).of(np.array([[0.1, 60.0], [0.1, 110.0]]), np.zeros((2, 2)))
    assert found == pytest.approx([0.4 * 0.4, 0.0])
    assert Promise(np.zeros((0, 2)), box, np.full(2, np.inf)).of(points[:1], np.zeros((1, 2))) == pytest.approx([0.36])
