"""Against brute force: pairwise comparison, and a volume counted on a grid."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evo.pareto import Scale, knee, nondominated

UNIT = Scale(np.zeros(2), np.ones(2))
GRID = st.integers(0, 10).map(lambda i: i / 10)
POINTS = st.integers(1, 12).flatmap(lambda n: arrays(float, (n, 2), elements=GRID))


@given(POINTS)
def test_nondominated_by_pairwise_comparison(points):
    expected = [not any((q <= p).all() and (q < p).any() for q in points) for p in points]
    assert nondominated(points).tolist() == expected


@given(POINTS)
def test_hypervolume_by_counting_cells(points):
    centers = (np.arange(10) + 0.5) / 10  # points lie on cell corners, so counting cells is exact
    cells = np.stack(np.meshgrid(centers, centers), -1).reshape(-1, 1, 2)
    assert UNIT.hypervolume(points) == pytest.approx((points[None] <= cells).all(-1).any(-1).mean())


def test_nothing_is_an_empty_front():
    assert nondominated([]).tolist() == []
    assert UNIT.hypervolume([]) == 0.0


def test_points_outside_the_box_add_nothing():
    assert UNIT.hypervolume([[0.5, 0.5], [0.1, 1.2], [1.5, 0.0]]) == pytest.approx(0.25)


def test_scale_of_parents_is_the_stated_box():
    scale = Scale.of_parents(("error", "tokens"), [[0.05, 60.0], [0.4, 20.0]])
    assert scale.reference.tolist() == pytest.approx([1.0, 66.0])  # error 1, 1.1 x the wordiest
    assert scale([0.5, 33.0]).tolist() == pytest.approx([0.5, 0.5])


def test_knee_is_nearest_to_the_ideal():
    assert knee([[0.0, 1.0], [0.3, 0.3], [1.0, 0.0]], UNIT) == 1
    assert knee([[0.4, 0.3], [0.3, 0.4], [0.3, 0.4]], UNIT) == 1  # of equals the lower first loss, then the first


def test_a_box_that_does_not_start_at_zero():
    scale = Scale(np.array([0.25, 10.0]), np.array([1.25, 50.0]))
    assert scale([0.5, 30.0]).tolist() == [0.25, 0.5]
    assert scale.hypervolume([[0.5, 30.0]]) == pytest.approx(0.75 * 0.5)
