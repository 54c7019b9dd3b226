"""Sums and order statistics of whole parts, with the same bits whatever the order of the elements.

Floating-point sums depend on their order, hence on threads, devices and blocks. Here every term is rounded to
a multiple of one power of two, and integers are summed, whose sum has no order. With N terms no larger than p
each is off by at most p N 2^-61: for 2^27 squares of a normal variable that is some 1e-13 of their sum.
Everything goes through blocks, so that memory does not grow with the part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from evo.merge.blocks import Block, blocks

BLOCK_ELEMENTS = 1 << 20
SORT_UP_TO = 1 << 17
_TRAILING_BITS = 13
_TRAILING_MASK = (1 << _TRAILING_BITS) - 1


def peak(values: Callable[[Block], Tensor], like: Tensor) -> float:
    """Largest magnitude of values(block) over all blocks of a matrix."""
    return max((float(values(block).abs().max()) for block in blocks(like, BLOCK_ELEMENTS)), default=0.0)


def exact_sum(terms: Callable[[Block], Tensor], like: Tensor, largest: float, *, by_row: bool = False) -> Tensor:
    """Sum terms(block), in float64, over a matrix.

    Args:
        terms: the float64 terms of a block.
        like: a matrix of the same shape and device.
        largest: a bound on the magnitude of a term.
        by_row: sum every row by itself.

    Returns:
        float64, shape () or (R,); NaN if there is no finite bound.
    """
    n_rows, device = like.shape[0], like.device
    shape = (n_rows,) if by_row else ()
    if largest == 0.0 or not math.isfinite(largest):
        return torch.full(shape, 0.0 if largest == 0.0 else math.nan, dtype=torch.float64, device=device)
    scale = 2.0 ** (62 - math.frexp(largest * like.numel())[1])
    sums = torch.zeros(n_rows, dtype=torch.int64, device=device)
    for rows, columns in blocks(like, BLOCK_ELEMENTS):
        sums[rows] += terms((rows, columns)).mul_(scale).round_().to(torch.int64).sum(1)
    return (sums if by_row else sums.sum()).double() * (1.0 / scale)


def gram(vectors: Sequence[Tensor], origin: Tensor | None = None, *, by_row: bool = False) -> Tensor:
    """Inner products of matrices taken as vectors, or, with by_row, of their rows.

    Args:
        vectors: V matrices in any float dtype.
        origin: subtracted from each, if given.
        by_row: take every row by itself.

    Returns:
        float64 on the CPU, shape (V, V) or (R, V, V).
    """

    def doubles(v: int) -> Callable[[Block], Tensor]:
        if origin is None:
            return lambda block: vectors[v][block].double()
        return lambda block: vectors[v][block].double() - origin[block]

    peaks = [peak(doubles(v), vectors[0]) for v in range(len(vectors))]
    n = len(vectors)
    products: list[list[Tensor]] = [[torch.empty(0)] * n for _ in range(n)]
    for i in range(n):
        for j in range(i + 1):
            x, y = doubles(i), doubles(j)
            value = exact_sum(_product(x, y), vectors[0], peaks[i] * peaks[j], by_row=by_row).cpu()
            products[i][j] = products[j][i] = value
    return torch.stack([torch.stack(row, dim=-1) for row in products], dim=-2)


def _product(x: Callable[[Block], Tensor], y: Callable[[Block], Tensor]) -> Callable[[Block], Tensor]:
    return lambda block: x(block) * y(block)


def order_statistics(values: Callable[[Block], Tensor], like: Tensor, ranks: Sequence[int]) -> list[float]:
    """The values of given ranks, exactly; of large matrices in two passes and without a sort.

    The bits of non-negative float32 numbers are in the order of the numbers. The first pass counts the values
    by their leading bits; the second counts, by their trailing bits, those that lead like a wanted value.

    Args:
        values: the non-negative float32 values of a block.
        like: a matrix of the same shape and device.
        ranks: from 0, the smallest, to N - 1.
    """
    rank = torch.tensor(ranks, dtype=torch.int64, device=like.device)
    found: list[float]
    if like.numel() <= SORT_UP_TO:
        everything = torch.cat([values(block).reshape(-1) for block in blocks(like, BLOCK_ELEMENTS)])
        found = everything.sort().values[rank].tolist()
        return found

    def count(bin_of: Callable[[Tensor], Tensor], n_bins: int) -> Tensor:
        counts = torch.zeros(n_bins, dtype=torch.int64, device=like.device)
        for block in blocks(like, BLOCK_ELEMENTS):
            counts += torch.bincount(bin_of(values(block).reshape(-1).view(torch.int32)), minlength=n_bins)
        return counts

    leading = count(lambda bits: bits >> _TRAILING_BITS, 1 << (31 - _TRAILING_BITS))
    ends = leading.cumsum(0)
    bucket = torch.searchsorted(ends, rank, right=True)
    buckets, row = torch.unique(bucket, return_inverse=True)
    row_of = torch.full_like(leading, len(buckets), dtype=torch.int32)  # the last row is for all that nobody wants
    row_of[buckets] = torch.arange(len(buckets), dtype=torch.int32, device=like.device)
    trailing = count(
        lambda bits: (row_of[bits >> _TRAILING_BITS] << _TRAILING_BITS) + (bits & _TRAILING_MASK),
        (len(buckets) + 1) << _TRAILING_BITS,
    ).view(-1, 1 << _TRAILING_BITS)
    rank_in_bucket = rank - (ends - leading)[bucket]
    low = torch.searchsorted(trailing.cumsum(1)[row], rank_in_bucket[:, None], right=True)[:, 0]
    found = ((bucket << _TRAILING_BITS) + low).to(torch.int32).view(torch.float32).tolist()
    return found
