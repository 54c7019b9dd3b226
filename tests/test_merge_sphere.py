"""Slerp and its kin: angles by hand, and means against plain geometry in float64."""

import math

import numpy as np
import pytest
import torch

from evo.merge import get_method
from tests.merging import merge

X, Y, Z = (torch.tensor(v) for v in ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]))
SPHERICAL = ["slerp", "nuslerp", "multislerp", "karcher"]


def at(degrees):
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), 0.0]


@pytest.mark.parametrize("t", [0.25, 0.5, 2 / 3])
def test_slerp_turns_by_the_share_of_the_angle(t):
    assert merge("slerp", [Y], X, [t]).tolist() == pytest.approx(at(90 * t), abs=1e-6)


def test_slerp_interpolates_lengths_too():
    # sin(45) / sin(90) = 0.7071 of each
    assert merge("slerp", [4 * Y], 2 * X, [0.5]).tolist() == pytest.approx([2**0.5, 8**0.5, 0.0])


def test_slerp_of_nearly_parallel_vectors_is_a_line():
    near = torch.tensor([1.0, 0.02, 0.0])  # cosine 0.9998
    assert merge("slerp", [near], X, [0.5]).tolist() == pytest.approx([1.0, 0.01, 0.0], abs=1e-7)


def test_slerp_pulls_donor_by_donor():
    # Halfway to y, then a third of the way (30 degrees of 90) to z.
    expected = [math.cos(math.radians(30)) / 2**0.5] * 2 + [0.5]
    assert merge("slerp", [Y, Z], X, [0.5, 1 / 3]).tolist() == pytest.approx(expected, abs=1e-6)
    copy_of = get_method("slerp").copy_of
    assert [copy_of(c) for c in ([0.0, 0.0], [0.5, 1.0], [1.0, 0.0], [1.0, 0.5])] == [0, 2, 1, None]


def test_nuslerp_of_points_and_of_task_vectors():
    assert merge("nuslerp", [Y], X, [0.25]).tolist() == pytest.approx(at(22.5), abs=1e-6)
    base = torch.tensor([1.0, 1.0, 5.0])
    merged = merge("nuslerp", [base + 3 * X, base + 3 * Y], base, [0.5, 1.0], {"origin": 1.0})
    assert merged.tolist() == pytest.approx([1 + 3 * 0.5, 1 + 3 * math.sin(math.radians(60)), 5.0], abs=1e-6)


def test_multislerp_has_the_mean_direction_and_the_mean_length():
    merged = merge("multislerp", [2 * Y, 3 * Z], X, [1 / 3, 1 / 3])
    assert merged.tolist() == pytest.approx([2 / 3**0.5] * 3, abs=1e-6)


def test_multislerp_tangent_step_vanishes():
    """The method as it is described, with its tangent space, in float64: the step is zero."""
    rng = np.random.default_rng(0)
    points, w = rng.standard_normal((3, 50)), np.array([0.2, 0.5, 0.3])
    units = points / np.linalg.norm(points, axis=1, keepdims=True)
    mean = w @ units / np.linalg.norm(w @ units)
    tangent = w @ (units - (units @ mean)[:, None] * mean)
    assert np.linalg.norm(tangent) < 1e-12
    expected = mean * (w @ np.linalg.norm(points, axis=1))
    base, *donors = (torch.from_numpy(p).float() for p in points)
    assert torch.allclose(merge("multislerp", donors, base, w[1:]).double(), torch.from_numpy(expected), atol=1e-6)


def test_opposite_directions_fall_back_to_a_line():
    for name in ("multislerp", "karcher"):
        assert torch.isfinite(merge(name, [-X], X, [0.5])).all()
    assert merge("multislerp", [-3 * X], X, [0.5]).tolist() == [-1.0, 0.0, 0.0]


def test_karcher_of_two_points_is_slerp():
    assert merge("karcher", [Y], X, [0.75], {"max_iter": 100, "tol": 1e-9}).tolist() == pytest.approx(
        at(67.5), abs=1e-6
    )


def test_karcher_mean_is_where_the_pulls_cancel():
    """The first-order condition, sum w log_mu(u) = 0, checked by an independent computation."""
    rng = np.random.default_rng(1)
    points, w = rng.standard_normal((4, 30)) + 0.3, np.array([0.1, 0.2, 0.3, 0.4])
    base, *donors = (torch.from_numpy(p).float() for p in points)
    merged = merge("karcher", donors, base, w[1:], {"max_iter": 100, "tol": 1e-9}).double().numpy()
    assert np.linalg.norm(merged) == pytest.approx(w @ np.linalg.norm(points, axis=1), rel=1e-5)
    mu, units = merged / np.linalg.norm(merged), points / np.linalg.norm(points, axis=1, keepdims=True)
    cosines = units @ mu
    logs = (np.arccos(cosines) / np.sqrt(1 - cosines**2))[:, None] * (units - cosines[:, None] * mu)
    assert np.linalg.norm(w @ logs) < 1e-5


@pytest.mark.parametrize("name", SPHERICAL)
def test_parents_are_at_the_corners(name):
    donors = [torch.randn(40, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    base = torch.randn(40, generator=torch.Generator().manual_seed(0))
    for source, coefficients in enumerate(([0.0, 0.0], [1.0, 0.0], [0.0, 1.0])):
        assert torch.allclose(merge(name, donors, base, coefficients), [base, *donors][source], atol=1e-5)
        assert get_method(name).copy_of(coefficients, origin=0.0) == source


@pytest.mark.parametrize("name", ["nuslerp", "multislerp"])
def test_a_single_task_vector_is_its_donor_at_any_weight(name):
    assert get_method(name).copy_of([0.3, 0.0], origin=1.0) == 1
    assert get_method(name).copy_of([0.0, 0.0], origin=1.0) == 0
    assert get_method(name).copy_of([0.3, 0.0], origin=0.0) is None
    base, donor, other = X + Y, 2 * Z, 3 * Y
    assert torch.allclose(merge(name, [donor, other], base, [0.3, 0.0], {"origin": 1.0}), donor, atol=1e-6)


def test_karcher_of_numbers_of_both_signs_is_a_number():
    # On a sphere of dimension 0 opposite directions have no arc between them, only rounding.
    rng = np.random.default_rng(3347255)
    for _ in range(200):
        base, *donors = (torch.from_numpy(rng.standard_normal(1, dtype=np.float32)) for _ in range(4))
        merged = merge("karcher", donors, base, [1.0, 1.0, 1.0], {"origin": 0.0, "max_iter": 1000, "tol": 0.1})
        assert merged.isfinite().all()
