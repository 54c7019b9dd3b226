"""TIES, Breadcrumbs, DARE and DELLA: by hand where nothing is random, in distribution where something is."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evo.merge import get_method
from evo.merge.della_linear import ranks_by_magnitude
from evo.merge.task_vectors import GRID, copy_of_sparse, magnitude_ranges, range_at
from tests.merging import merge

ZERO = torch.zeros(4)
A, B = torch.tensor([4.0, -3.0, 2.0, 1.0]), torch.tensor([-1.0, 5.0, 3.0, 2.0])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestTies:
    def test_by_hand(self):
        # Trimmed to half: (4, -3, 0, 0) and (0, 5, 3, 0). Elected: +, + (5 > 3), +. Averages of what agrees.
        assert merge("ties", [A, B], ZERO, [1.0, 1.0], {"density": 0.5}).tolist() == [4.0, 5.0, 3.0, 0.0]

    def test_weights_move_the_election_and_the_average(self):
        # Weighted: (8, -6, 4, 2) and (-1, 5, 3, 2). Elected +, -, +, +; (4*2)/2, (-3*2)/2, (2*2+3)/3, (1*2+2)/3.
        merged = merge("ties", [A, B], ZERO, [2.0, 1.0])
        assert merged.tolist() == pytest.approx([4.0, -3.0, 7 / 3, 4 / 3])

    def test_sums_without_normalize_and_times_lambda(self):
        knobs = {"density": 0.5, "normalize": 0.0, "lambda": 0.5}
        assert merge("ties", [A + 1.0, B + 1.0], ZERO + 1.0, [2.0, 1.0], knobs).tolist() == [5.0, -2.0, 2.5, 1.0]

    def test_a_draw_is_positive(self):
        draw = merge("ties", [torch.tensor([2.0]), torch.tensor([-2.0])], torch.zeros(1), [1.0, 1.0])
        assert draw.item() == 2.0

    def test_density_of_one_donor(self):
        assert merge("ties", [A, B], ZERO, [1.0, 1.0], {"density:b": 0.25}).tolist() == [4.0, 5.0, 2.0, 1.0]

    def test_equal_magnitudes_at_the_edge_are_all_kept(self):
        tau = torch.tensor([1.0, -1.0, 1.0, 0.5])
        assert merge("ties", [tau], ZERO, [1.0], {"density": 0.25}).tolist() == [1.0, -1.0, 1.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.floats(0, 1), st.integers(0, GRID), st.integers(0, 1 << 30))
def test_thresholds_keep_the_largest_exactly(n, density, grid_point, seed):
    """max(1, int(density n)) elements are kept, on and off the grid, as a full sort says."""
    donor, base = normal(1, n, seed=seed % 1000), torch.zeros(1, n)
    for rho in (density, grid_point / GRID):
        smallest, largest = range_at(magnitude_ranges([donor], base, density=rho), rho)
        kept = (donor.abs() >= smallest) & (donor.abs() <= largest)
        n_kept = max(1, int(rho * n)) if rho else 0
        expected = donor.abs()[0].argsort(descending=True)[:n_kept]
        assert sorted(kept[0].nonzero()[:, 0].tolist()) == sorted(expected.tolist())


class TestBreadcrumbs:
    TAU = torch.arange(1.0, 11.0) * torch.tensor([1.0, -1.0] * 5)

    def test_by_hand(self):
        # Of ten, the largest two are outliers; of the rest the five largest are kept: 4 to 8.
        merged = merge("breadcrumbs", [self.TAU], torch.zeros(10), [0.5], {"density": 0.5, "gamma": 0.2})
        assert merged.tolist() == [0, 0, 0, -2.0, 2.5, -3.0, 3.5, -4.0, 0, 0]

    def test_outliers_stay_where_the_density_needs_them(self):
        merged = merge("breadcrumbs", [self.TAU], torch.zeros(10), [1.0], {"density": 0.9, "gamma": 0.5})
        assert merged.tolist() == [*self.TAU[:9].tolist(), 0.0]

    def test_ties_elects_and_sums(self):
        donors = [torch.tensor([3.0, 2.0]), torch.tensor([-1.0, 1.0])]
        assert merge("breadcrumbs", donors, torch.zeros(2), [1.0, 1.0]).tolist() == [2.0, 3.0]
        assert merge("breadcrumbs_ties", donors, torch.zeros(2), [1.0, 1.0]).tolist() == [3.0, 3.0]


N = 1 << 17


class TestDare:
    TAU, BASE = normal(256, 512), normal(256, 512, seed=1)

    @pytest.mark.parametrize("density", [0.05, 0.3, 0.5, 0.9])
    def test_keep_rate_rescaling_and_expectation(self, density):
        merged = merge("dare_linear", [self.TAU], torch.zeros(256, 512), [1.0], {"density": density})
        kept = merged != 0.0
        rate = kept.double().mean().item()
        assert abs(rate - density) < 5 * math.sqrt(density * (1 - density) / N)
        assert torch.allclose(merged[kept], (self.TAU * (1.0 / density))[kept])
        # sum(merged * tau) estimates sum(tau^2); its standard error is that of a weighted count.
        error = (merged * self.TAU).sum() / self.TAU.square().sum() - 1.0
        assert abs(error) < 5 * math.sqrt((1 - density) / density * 3 / N)

    def test_without_rescaling(self):
        merged = merge("dare_linear", [self.TAU], torch.zeros(256, 512), [1.0], {"density": 0.5, "rescale": 0.0})
        assert torch.equal(merged[merged != 0.0], self.TAU[merged != 0.0])

    def test_a_higher_density_only_adds_elements(self):
        masks = [
            merge("dare_linear", [self.TAU], torch.zeros(256, 512), [1.0], {"density": density}) != 0.0
            for density in (0.2, 0.21, 0.7, 1.0)
        ]
        assert all((lower <= higher).all() for lower, higher in itertools.pairwise(masks))
        assert masks[-1].all()

    def test_donors_have_masks_of_their_own(self):
        one = merge("dare_linear", [self.TAU, self.BASE], torch.zeros(256, 512), [1.0, 0.0], {"density": 0.5}) != 0.0
        two = merge("dare_linear", [self.BASE, self.TAU], torch.zeros(256, 512), [0.0, 1.0], {"density": 0.5}) != 0.0
        assert abs((one & two).double().mean().item() - 0.25) < 0.01

    def test_ties_elects_signs_after_dropping(self):
        donors = [torch.ones(1, N), torch.full((1, N), -0.75)]
        knobs = {"density": 0.5, "rescale": 0.0}
        merged = merge("dare_ties", donors, torch.zeros(1, N), [1.0, 1.0], knobs)
        values, counts = merged.unique(return_counts=True)
        assert values.tolist() == [-0.75, 0.0, 1.0]  # where both are kept, the larger wins
        assert (counts / N).tolist() == pytest.approx([0.25, 0.25, 0.5], abs=0.01)


class TestDella:
    ROWS, COLUMNS = 32, 2048
    TAU = normal(ROWS, COLUMNS, seed=3) * torch.logspace(-3, 1, ROWS)[:, None]  # rows of very different scale
    KNOBS: dict[str, float] = {"density": 0.4, "epsilon": 0.2}  # noqa: RUF012

    def chances(self):
        """Chance of each element by the paper: exact ranks within each row."""
        ranks = self.TAU.abs().argsort(1).argsort(1) / (self.COLUMNS - 1)
        return 0.2 + 0.4 * ranks

    def merged(self, seed=0, **knobs):
        base = torch.zeros(self.ROWS, self.COLUMNS)
        return merge("della_linear", [self.TAU], base, [1.0], {**self.KNOBS, **knobs}, seed)

    def test_keep_rate_is_the_density_and_grows_with_the_rank_in_the_row(self):
        kept = torch.stack([self.merged(seed) != 0.0 for seed in range(8)]).double().mean(0)
        assert abs(kept.mean().item() - 0.4) < 0.004
        for low in np.arange(0.2, 0.6, 0.05):
            inside = (self.chances() >= low) & (self.chances() < low + 0.05)
            assert kept[inside].mean().item() == pytest.approx(low + 0.025, abs=0.01)
        rows = kept.mean(1)  # no row is favoured for its scale
        assert (rows - 0.4).abs().max() < 0.03

    def test_kept_elements_are_divided_by_their_chance(self):
        merged = self.merged()
        chance = (self.TAU / merged)[merged != 0.0]
        assert (chance - self.chances()[merged != 0.0]).abs().max() < 0.04
        assert torch.equal(self.merged(rescale=0.0)[merged != 0.0], self.TAU[merged != 0.0])

    def test_expectation_is_the_task_vector(self):
        mean = torch.stack([self.merged(seed) for seed in range(10)]).mean(0)
        slopes = (mean * self.TAU).sum(1) / self.TAU.square().sum(1)
        assert (slopes - 1.0).abs().max() < 0.1 and abs(slopes.mean() - 1.0) < 0.015

    def test_table_of_ranks_has_the_mean_of_ranks(self):
        stats = ranks_by_magnitude([self.TAU], torch.zeros_like(self.TAU))
        relative = (self.TAU.abs() / self.TAU.abs().mean(1, keepdim=True)).double().numpy().ravel()
        assert stats.rows.shape == (self.ROWS, 1)
        assert torch.allclose(stats.rows[:, 0] * 32.0, 1.0 / self.TAU.abs().mean(1), rtol=1e-5)
        fraction, exponent = np.frexp(relative)  # relative = fraction * 2^exponent, fraction in [1/2, 1)
        bucket = np.clip((exponent + 9) * 4 + np.floor((fraction - 0.5) * 8).astype(int), 0, 63)
        ranks = np.empty(relative.size)
        ranks[np.argsort(relative)] = (np.arange(relative.size) + 0.5) / relative.size
        assert len(np.unique(bucket)) > 40
        for b in np.unique(bucket):
            assert float(stats.whole[b]) == pytest.approx(ranks[bucket == b].mean(), abs=2e-5)

    @pytest.mark.parametrize(("density", "rate"), [(0.0, 0.0), (0.05, 0.05), (0.95, 0.95), (1.0, 1.0)])
    def test_epsilon_is_narrowed_at_the_ends(self, density, rate):
        assert abs((self.merged(density=density, epsilon=0.4) != 0.0).double().mean().item() - rate) < 0.004

    def test_della_averages_what_agrees(self):
        donors = [torch.tensor([2.0, -1.0]), torch.tensor([4.0, 3.0])]
        assert merge("della", donors, torch.zeros(2), [1.0, 1.0]).tolist() == [3.0, 3.0]
        assert merge("della_linear", donors, torch.zeros(2), [1.0, 1.0]).tolist() == [6.0, 2.0]


@pytest.mark.parametrize(
    ("coefficients", "density", "normalize", "lambda_", "expected"),
    [
        ([0.0, 0.0], (1.0, 1.0), 0.0, 1.0, 0),
        ([0.5, 0.5], (0.0, 0.0), 0.0, 1.0, 0),
        ([0.5, 0.5], (1.0, 1.0), 0.0, 0.0, 0),
        ([1.0, 0.0], (1.0, 0.5), 0.0, 1.0, 1),
        ([0.0, 0.3], (1.0, 1.0), 1.0, 1.0, 2),
        ([0.0, 0.3], (1.0, 1.0), 0.0, 1.0, None),
        ([0.0, 0.5], (1.0, 1.0), 0.0, 2.0, 2),
        ([1.0, 0.0], (0.5, 1.0), 0.0, 1.0, None),
        ([1.0, 0.5], (1.0, 0.0), 0.0, 1.0, None),
    ],
)
def test_copy_of_sparse(coefficients, density, normalize, lambda_, expected):
    assert copy_of_sparse(coefficients, density=density, normalize=normalize, lambda_=lambda_) == expected


def test_grid_thresholds_are_measured_once_for_all_densities():
    key = get_method("ties").measure.key
    assert key(density=0.25) == key(density=0.5) != key(density=0.3)
    key = get_method("breadcrumbs").measure.key
    assert key(density=0.25, gamma=0.1) == key(density=0.5, gamma=0.1) != key(density=0.5, gamma=0.2)
