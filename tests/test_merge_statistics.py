"""Sums without an order, order statistics without a sort, noise without a sequence."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evo.merge import METHODS, get_method, statistics
from evo.merge.blocks import as_matrix, blocks
from evo.merge.noise import stream_key, uniforms
from evo.merge.statistics import exact_sum, gram, order_statistics, peak
from tests.merging import SETTINGS, arguments_of


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 30))
def test_blocks_cover_every_element_once_and_in_order(n_rows, n_columns, size):
    matrix = torch.arange(n_rows * n_columns).view(n_rows, n_columns)
    pieces = [matrix[block].reshape(-1) for block in blocks(matrix, size)]
    assert all(0 < len(piece) <= size for piece in pieces)
    assert torch.equal(torch.cat([*pieces, torch.empty(0, dtype=torch.int64)]), matrix.reshape(-1))


@pytest.mark.parametrize(
    ("shape", "expected"), [((), (1, 1)), ((5,), (1, 5)), ((2, 3), (2, 3)), ((2, 3, 4), (2, 12)), ((0, 3), (0, 0))]
)
def test_as_matrix(shape, expected):
    assert as_matrix(torch.zeros(shape)).shape == expected


class TestExactSum:
    def test_agrees_with_fsum(self):
        x = normal(50, 40)
        total = exact_sum(lambda block: x[block].double(), x, peak(lambda block: x[block], x))
        assert float(total) == pytest.approx(math.fsum(x.reshape(-1).tolist()), abs=1e-12)

    def test_order_does_not_change_a_bit(self):
        x = normal(1, 5000) * 1e3
        y = x[:, torch.randperm(5000, generator=torch.Generator().manual_seed(1))]
        sums = {float(exact_sum(lambda b, t=t: t[b].double(), t, 5e3)) for t in (x, y, y.view(50, 100))}
        assert len(sums) == 1

    def test_rows(self):
        x = normal(5, 7)
        rows = exact_sum(lambda block: x[block].double(), x, 5.0, by_row=True)
        assert torch.allclose(rows, x.double().sum(1), atol=1e-12)

    def test_nothing_and_nonsense(self):
        x = torch.zeros(2, 2)
        assert float(exact_sum(lambda block: x[block].double(), x, 0.0)) == 0.0
        assert math.isnan(float(exact_sum(lambda block: x[block].double(), x, math.inf)))


def test_gram_is_that_of_float64():
    base, a, b = (normal(6, 9, seed=s).bfloat16() for s in range(3))
    vectors = torch.stack([a, b]).double().view(2, -1) - base.double().view(1, -1)
    assert torch.allclose(gram([a, b], base), vectors @ vectors.T, rtol=1e-12)
    rows = torch.stack([a, b]).double() - base.double()
    assert torch.allclose(gram([a, b], base, by_row=True), torch.einsum("vrc,wrc->rvw", rows, rows), rtol=1e-12)


@pytest.mark.parametrize("sort_up_to", [0, 1 << 16])
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(0, 1 << 30), st.booleans())
def test_order_statistics_are_those_of_a_sort(sort_up_to, n, seed, rounded):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(np.abs(rng.standard_normal((1, n), dtype=np.float32)))
    x = (x * 4).round() if rounded else x  # many ties, and zeros
    ranks = sorted({0, n - 1, *rng.integers(0, n, 5).tolist()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "SORT_UP_TO", sort_up_to)
        patch.setattr(statistics, "BLOCK_ELEMENTS", 150)
        assert order_statistics(lambda block: x[block], x, ranks) == np.sort(x.numpy()[0])[ranks].tolist()


class TestNoise:
    def test_is_the_hash_that_it_claims_to_be(self):
        """Against C. Wellons' lowbias32 in numpy's unsigned arithmetic, with the second key in the middle."""
        key = stream_key("some", "place")
        k0, k1 = (np.uint32(k & 0xFFFFFFFF) for k in key)
        x = np.arange(500, dtype=np.uint32) ^ k0
        x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
        x = x ^ k1
        x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
        x = x ^ (x >> 16)
        halves = np.stack([x & 0xFFFF, x >> 16], 1).reshape(-1).astype(np.int64)
        expected = (halves ^ 0x8000) / 65536  # signed halves, shifted to start at 0
        assert uniforms(key, 0, 1000).tolist() == expected.tolist()

    @settings(deadline=None)
    @given(st.integers(0, 1 << 33), st.integers(0, 50), st.integers(0, 50))
    def test_depends_on_the_place_only(self, start, n, m):
        key = stream_key(1)
        assert torch.equal(
            uniforms(key, start, n + m), torch.cat([uniforms(key, start, n), uniforms(key, start + n, m)])
        )

    def test_is_uniform_and_streams_are_independent(self):
        n = 1 << 18
        streams = torch.stack([uniforms(stream_key(0, donor), 0, n) for donor in range(4)]).double()
        counts = torch.stack([torch.histc(s, 16, 0, 1) for s in streams])
        chi2 = ((counts - n / 16) ** 2 / (n / 16)).sum(1)  # 15 degrees of freedom: 15 +- 5.5
        assert chi2.max() < 40
        correlations = torch.corrcoef(torch.cat([streams, streams.roll(1, 1)]))
        assert (correlations - torch.eye(8)).abs().max() < 5 / math.sqrt(n)

    def test_keys_differ(self):
        assert len({stream_key(0, d, t, r) for d in "ab" for t in ("x", "y") for r in (None, 0, 1)}) == 12


@pytest.mark.parametrize("name", [name for name in METHODS if get_method(name).measure])
def test_a_part_without_elements_is_measured(name):
    """No block of it is merged then."""
    empty = torch.zeros(0, 8)
    stats = arguments_of(name, {"a": empty, "b": empty}, empty, SETTINGS.get(name, {}))["stats"]
    assert all(s.rows is None or len(s.rows) == 0 for s in (stats if isinstance(stats, list) else [stats]))
