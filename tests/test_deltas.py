"""Compressed differences, against quantisation and SVD by numpy."""

import numpy as np
import pytest
import torch

from evo.deltas import BLOCK, Absmax, Deltas, LowRankDelta, parse
from evo.merge.blocks import blocks


def base_and_delta(shape, seed=0):
    rng = np.random.default_rng(seed)
    base = torch.from_numpy(rng.normal(size=shape).astype(np.float32)).bfloat16()
    return base, torch.from_numpy((0.01 * rng.normal(size=shape)).astype(np.float32))


def quantised(delta: np.ndarray, bits: int) -> np.ndarray:
    """Number by number, as the paper says it."""
    found = np.zeros_like(delta)
    largest = np.float32(2 ** (bits - 1) - 1)
    for row in range(delta.shape[0]):
        for start in range(0, delta.shape[1], BLOCK):
            block = delta[row, start : start + BLOCK]
            scale = np.abs(block).max() / largest
            if scale > 0:
                found[row, start : start + BLOCK] = np.round(block / scale) * scale
    return found


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(5, 384), (3, 300), (7, 2)])
def test_blockwise_absmax(bits, shape):
    base, delta = base_and_delta(shape)
    delta[1] = 0.0
    donor = Absmax(bits)
    kept = donor.compress(lambda block: delta[block], base)
    expected = base.float() + torch.from_numpy(quantised(delta.numpy(), bits))
    assert torch.equal(donor.donor(base, kept)[:], expected)
    assert sum(t.numel() * t.element_size() for t in kept) == donor.n_bytes(shape)
    operand = donor.donor(base, kept)
    for size in (1, 64, 129, 1000):  # blocks that begin and end inside a tile
        for block in blocks(base, size):
            assert torch.equal(operand[block], expected[block])


def test_bands_of_a_large_matrix_are_quantised_alike():
    base, delta = base_and_delta((1200, 256))  # more than one band
    kept = Absmax(4).compress(lambda block: delta[block], base)
    assert torch.equal(Absmax(4).donor(base, kept)[:] - base.float(), (base.float() + torch.from_numpy(
        quantised(delta.numpy(), 4))) - base.float())  # fmt: skip


@pytest.mark.parametrize("rank", [1, 6])
def test_low_rank_is_as_near_as_the_svd(rank):
    rng = np.random.default_rng(1)
    u, v = np.linalg.qr(rng.normal(size=(60, 40)))[0], np.linalg.qr(rng.normal(size=(40, 40)))[0]
    values = 0.7 ** np.arange(40)
    delta = torch.from_numpy(((u * values) @ v.T).astype(np.float32))
    base = torch.zeros(60, 40)
    kept = LowRankDelta(rank).compress(lambda block: delta[block], base)
    left = (LowRankDelta(rank).donor(base, kept)[:] - delta).norm().item()
    best = np.sqrt((values[rank:] ** 2).sum())  # Eckart and Young
    assert best * 0.999 <= left <= best * 1.01
    assert sum(t.numel() * t.element_size() for t in kept) == LowRankDelta(rank).n_bytes((60, 40))
    again = LowRankDelta(rank).compress(lambda block: delta[block], base)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_errors_are_relative_and_by_source():
    base, delta = base_and_delta((4, 256))
    donors = {"a": (base.float() + delta), "b": (base.float() + 2 * delta)}
    deltas = Deltas(Absmax(4), "base")
    for name, donor in donors.items():
        for part in ("first", "second"):
            deltas.donor(name, part, base, lambda donor=donor: donor)
    for name, donor in donors.items():
        exact = (donor - base.float()).numpy()
        expected = np.linalg.norm(quantised(exact, 4) - exact) / np.linalg.norm(exact)
        assert deltas.errors[name] == pytest.approx(expected, rel=1e-3)


def test_each_donor_is_read_once():
    base, delta = base_and_delta((4, 256))
    deltas, reads = Deltas(Absmax(8), "base"), []
    for _ in range(2):
        deltas.donor("a", "part", base, lambda: reads.append(1) or base.float() + delta)
    assert len(reads) == 1


def test_what_is_not_worth_it_stays_exact():
    assert not Deltas(Absmax(8), "base").covers((1, 4096))
    assert Deltas(Absmax(8), "base").covers((64, 4096))
    assert not Deltas(LowRankDelta(64), "base").covers((64, 64))
    assert Deltas(LowRankDelta(4), "base").covers((64, 64))


@pytest.mark.parametrize("wrong", ["int3", "low_rank", "low_rank(0)", "low_rank(4096)", ""])
def test_other_names_are_refused(wrong):
    with pytest.raises(ValueError, match=r"expected exact, int8, int4 or low_rank\(RANK\)"):
        parse(wrong)
    assert parse("low_rank(8)") == LowRankDelta(8) and parse("exact") is None and parse("int4") == Absmax(4)
