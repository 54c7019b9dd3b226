"""Methods that are of no family: by hand."""

import numpy as np
import pytest
import torch

from evo.merge import get_method
from tests.merging import merge

ZERO = torch.zeros(3)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestModelStock:
    @pytest.mark.parametrize(
        ("second", "t"),
        [([2.0, 0.0], 1.0), ([0.0, 2.0], 0.0), ([1.0, 3.0**0.5], 2 * 0.5 / 1.5)],  # cosines 1, 0, 0.5
    )
    def test_two_donors(self, second, t):
        a, b, base = torch.tensor([2.0, 0.0]), torch.tensor(second), torch.tensor([1.0, -1.0])
        expected = base + t * (a + b) / 2
        assert torch.allclose(merge("model_stock", [base + a, base + b], base, [1.0, 1.0]), expected, atol=1e-6)

    def test_three_donors_at_right_angles_but_one_pair(self):
        # cosines 1, 0, 0: mean 1/3; t = 3 / 3 / (1 + 2 / 3) = 0.6
        donors = [torch.tensor(v) for v in ([1.0, 0.0], [1.0, 0.0], [0.0, 1.0])]
        assert merge("model_stock", donors, torch.zeros(2), [1.0] * 3).tolist() == pytest.approx([0.4, 0.2])

    def test_filter_wise_takes_every_row_by_itself(self):
        a, b = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        merged = merge("model_stock", [a, b], torch.zeros(2, 2), [1.0, 1.0], {"filter_wise": 1.0})
        assert torch.allclose(merged, torch.tensor([[1.0, 0.0], [0.0, 0.0]]), atol=1e-7)

    def test_one_donor_is_taken_whole(self):
        assert merge("model_stock", [torch.tensor([2.0, 4.0])], torch.zeros(2), [0.5]).tolist() == [1.0, 2.0]


class TestSce:
    A, B = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([-1.0, 1.0, 1.0])

    def test_by_hand(self):
        # Energies 10 and 3. Signs +, +, +: 3 from a alone; 1 from both; 1 from b alone.
        assert merge("sce", [self.A, self.B], ZERO, [1.0, 1.0]).tolist() == pytest.approx([3.0, 1.0, 1.0])

    def test_selects_what_varies_most(self):
        # Variances 4, 0, 1/4: two vary, half of them is one. Energies 9 and 1; sign +: a alone.
        merged = merge("sce", [self.A, self.B], ZERO, [1.0, 1.0], {"select_topk": 0.5})
        assert merged.tolist() == pytest.approx([3.0, 0.0, 0.0])

    def test_energies_weigh(self):
        a, b = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])  # energies 4 and 2
        assert merge("sce", [a, b], torch.zeros(2), [1.0, 1.0]).tolist() == pytest.approx([(8 + 2) / 6, 1.0])
        assert merge("sce", [a, b], torch.zeros(2), [0.5, 0.0]).tolist() == pytest.approx([4 / 6, 0.0])


def test_nearswap_moves_by_at_most_t():
    base, donor = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.05, 3.0, 0.0])
    assert merge("nearswap", [donor], base, [1.0], {"t": 0.25}).tolist() == pytest.approx([1.05, 1.25, 0.75])
    # the rule as published: w b + (1 - w) a, w = min(1, t / |a - b|)
    a, b = normal(100), normal(100, seed=1)
    w = (0.3 / (a - b).abs()).clamp(max=1.0)
    assert torch.allclose(merge("nearswap", [b], a, [1.0], {"t": 0.3}), w * b + (1 - w) * a, atol=1e-6)


def test_arcee_fusion_against_numpy():
    base, donor = normal(6, 50), normal(6, 50, seed=1)
    b, d = base.double().numpy(), donor.double().numpy()
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (d, b))
    importance = np.abs(d - b) * (p * np.log(p / q)).sum(1, keepdims=True)
    low, median, high = np.sort(importance.reshape(-1))[[int(f * 299) for f in (0.25, 0.5, 0.75)]]
    expected = np.where(importance >= median + 1.5 * (high - low), d, b)
    merged = merge("arcee_fusion", [donor], base, [1.0])
    assert 0 < (merged != base).sum() < 100
    assert torch.allclose(merged.double(), torch.from_numpy(expected), atol=1e-6)


def test_ram_averages_only_what_several_changed():
    a, b = torch.tensor([2.0, 1.0, 0.001]), torch.tensor([4.0, 0.0, 0.0])
    assert merge("ram", [a, b], ZERO, [1.0, 1.0], {"epsilon": 0.01}).tolist() == [3.0, 1.0, 0.0]
    assert merge("ram", [a, b], ZERO, [0.5, 1.0], {"epsilon": 0.01}).tolist() == [2.5, 0.5, 0.0]


class TestAoe:
    BASE = torch.zeros(2, 2)
    NEAR, FAR = torch.full((2, 2), 0.1), torch.tensor([[2.0, 0.0], [0.0, 0.0]])  # distances 0.1 and 1.0

    def test_merges_where_the_farthest_parent_is_beyond_delta(self):
        merged = merge("aoe", [self.NEAR, self.FAR], self.BASE, [0.5, 0.25], {"delta": 0.99})
        assert torch.allclose(merged, 0.5 * self.NEAR + 0.25 * self.FAR)
        assert torch.equal(merge("aoe", [self.NEAR, self.FAR], self.BASE, [0.5, 0.25], {"delta": 1.0}), self.BASE)

    def test_a_share_of_one_copies_the_bits_behind_an_open_gate(self):
        donor = torch.tensor([[-0.0, 0.5], [0.0, 1.0]])
        for delta, expected in ((0.1, donor), (0.6, self.BASE)):
            merged = merge("aoe", [donor], self.BASE, [1.0], {"delta": delta})
            assert torch.equal(merged.view(torch.int32), expected.view(torch.int32))


def test_passthrough_picks_one_source_whole():
    base, a, b = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])
    for coefficients, expected in (([0.4, 0.3], 0), ([0.6, 0.3], 1), ([0.6, 0.9], 2), ([0.5, 0.0], 1)):
        assert get_method("passthrough").copy_of(coefficients, scale=1.0) == expected
        assert merge("passthrough", [a, b], base, coefficients, {"scale": 0.5}) == [base, a, b][expected] * 0.5
