"""Merge methods against hand-computed values and float64 arithmetic."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evo.merge import METHODS, get_method, one_hot
from evo.merge.linear import linear
from evo.merge.task_arithmetic import task_arithmetic

BASE, A, B = torch.tensor([1.0, -2.0, 4.0]), torch.tensor([3.0, 2.0, 4.0]), torch.tensor([-1.0, 0.0, 8.0])


def test_linear_by_hand():
    # 0.25 * base + 0.5 * A + 0.25 * B
    assert linear([A, B], BASE, [0.5, 0.25]).tolist() == [1.5, 0.5, 5.0]


def test_task_arithmetic_by_hand():
    # base + 0.5 * (2, 4, 0) + 2 * (-2, 2, 4)
    assert task_arithmetic([A, B], BASE, [0.5, 2.0]).tolist() == [-2.0, 4.0, 12.0]


@pytest.mark.parametrize("name", METHODS)
@given(data=st.data())
def test_close_to_float64_and_exact_where_a_copy_is_claimed(name, data):
    method = get_method(name)
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    n_donors = data.draw(st.integers(1, 4))
    coefficients = data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=n_donors, max_size=n_donors))
    base, *donors = (torch.from_numpy(rng.standard_normal(50, dtype=np.float32)) for _ in range(n_donors + 1))
    merged = method.merge(donors, base, coefficients).double()
    # Both are the same polynomial: base + sum c (donor - base) = (1 - sum c) base + sum c donor.
    expected = base.double() + sum(c * (d.double() - base.double()) for c, d in zip(coefficients, donors, strict=True))
    assert torch.allclose(merged, expected, atol=1e-5)
    if (copied := method.copy_of(coefficients)) is not None:
        assert torch.allclose(expected, [base, *donors][copied].double(), atol=1e-12)


def test_inputs_are_left_alone():
    for name in METHODS:
        before = BASE.clone(), A.clone()
        get_method(name).merge([A], BASE, [0.5])
        assert torch.equal(BASE, before[0]) and torch.equal(A, before[1])


@pytest.mark.parametrize(
    ("coefficients", "expected"),
    [([0.0], 0), ([1.0], 1), ([0.5], None), ([0.0, 1.0], 2), ([1.0, 1.0], None), ([1.0, 0.5], None), ([0.0, 0.0], 0)],
)
def test_one_hot(coefficients, expected):
    assert one_hot(coefficients) == expected
