"""Differences of donors to their base in fewer bits, so that a search needs little memory for its donors.

int8, int4: in blocks of 128 numbers along a row, number = round(value / scale) with scale = max |value| / 127 (or / 7),
as QLoRA quantises by absolute maximum (arXiv 2305.14314, section 2). low_rank(r): the r largest singular values, found
by a randomised SVD (arXiv 0909.4061). A compressed donor is its base plus what is left of its difference; what is
scored so is scored again with the donor itself before it is called a member of the front. Vectors stay exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from evo.encodings import EncodingError, cut_units
from evo.encodings.low_rank import MAX_RANK, LowRankSum, fixed_point
from evo.heap import GivingBack
from evo.merge.blocks import Block, Operand, Region, blocks
from evo.merge.kernels import symbol_of
from evo.merge.tape import Symbol, Tape, Untraceable

EXACT = "exact"
BLOCK = 128
"""Numbers that share a scale, a float32."""
OVERSAMPLING, ITERATIONS = 8, 4
"""Of the randomised SVD."""
_CHUNK = 1 << 18
_GIVE_BACK_BYTES = 64 << 20
"""Of differences in float32: beside 655 MB of five donors as int8, 348 MB of the heap were not in use."""
_SCRATCH = 48 << 20
"""Of blocks in flight: 30 to 57 MB were measured beside 135M parameters."""


class Compression(Protocol):
    """How a difference is kept."""

    def n_bytes(self, shape: tuple[int, int]) -> int:
        """Of a matrix (R, C) of differences."""

    def scratch_bytes(self, shape: tuple[int, int]) -> int:
        """That compressing a matrix and merging it take for a while, as measured; n_bytes not included."""

    def compress(self, delta: Callable[[Block], Tensor], like: Operand) -> tuple[Tensor, ...]:
        """What is kept of the float32 differences delta(block) of a matrix that is shaped like another."""

    def donor(self, base: Operand, kept: Sequence[Tensor]) -> Operand:
        """The base plus what has been kept."""

    def check(self, shape: tuple[int, int], region: Region) -> None:
        """Raise EncodingError unless a region of a matrix is compressed as it is in the whole."""


def parse(deltas: str) -> Compression | None:
    """What "int8", "int4" or "low_rank(RANK)" means; None for "exact".

    Raises:
        ValueError: for anything else.
    """
    rank = re.fullmatch(r"low_rank\((\d+)\)", deltas)
    if rank and 0 < int(rank[1]) <= MAX_RANK:
        return LowRankDelta(int(rank[1]))
    known: dict[str, Compression | None] = {EXACT: None, "int8": Absmax(8), "int4": Absmax(4)}
    if deltas not in known:
        raise ValueError(f"expected exact, int8, int4 or low_rank(RANK) with RANK up to {MAX_RANK}, got {deltas!r}")
    return known[deltas]


@dataclass(frozen=True)
class Absmax:
    """Whole numbers of 8 or 4 bits with a scale for each block."""

    bits: int

    @property
    def largest(self) -> int:
        """The largest whole number."""
        return (1 << (self.bits - 1)) - 1

    def n_bytes(self, shape: tuple[int, int]) -> int:
        """See Compression."""
        return shape[0] * (self._width(shape[1]) + 4 * -(-shape[1] // BLOCK))

    def scratch_bytes(self, shape: tuple[int, int]) -> int:
        """See Compression: blocks."""
        return _SCRATCH

    def _width(self, n_columns: int) -> int:
        """Bytes of a row's numbers."""
        return -(-n_columns * self.bits // 8)

    def compress(self, delta: Callable[[Block], Tensor], like: Operand) -> tuple[Tensor, ...]:
        """Codes (R, C), two to a byte if of 4 bits, the lower half first; and scales (R, tiles)."""
        (n_rows, n_columns), device = like.shape, like.device
        n_tiles = -(-n_columns // BLOCK)
        codes = torch.empty(n_rows, self._width(n_columns), dtype=torch.uint8, device=device)
        scales = torch.empty(n_rows, n_tiles, device=device)
        for top in range(0, n_rows, height := max(1, _CHUNK // max(1, n_columns))):
            rows = slice(top, min(top + height, n_rows))
            band = torch.zeros(rows.stop - top, n_tiles * BLOCK, device=device)
            band[:, :n_columns] = delta((rows, slice(0, n_columns)))
            tiles = band.view(-1, n_tiles, BLOCK)
            extremes = tiles.abs().amax(2)
            scales[rows] = extremes / torch.full_like(extremes, self.largest)  # not by a number: see evo.merge
            divisors = torch.where(scales[rows] > 0, scales[rows], 1.0)[..., None]
            numbers = (tiles / divisors).round_().clamp_(-self.largest, self.largest).to(torch.int8).flatten(1)
            codes[rows] = (numbers.view(torch.uint8) if self.bits == 8 else _pack(numbers))[:, : codes.shape[1]]
        return codes, scales

    def donor(self, base: Operand, kept: Sequence[Tensor]) -> Operand:
        """See Compression."""
        return _Quantized(base, kept[0], kept[1], self.bits)

    def check(self, shape: tuple[int, int], region: Region) -> None:
        """See Compression."""
        cut_units(region, shape, (1, BLOCK))


def _pack(numbers: Tensor) -> Tensor:
    low, high = ((numbers[:, i::2] + 8).to(torch.uint8) for i in (0, 1))
    return low | high << 4


def _unpack(codes: Tensor) -> Tensor:
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).to(torch.int8) - 8


class _Quantized:
    """A base plus quantised differences, which are decoded for the block that is read."""

    def __init__(self, base: Operand, codes: Tensor, scales: Tensor, bits: int) -> None:
        self._base, self._codes, self._scales, self._bits = base, codes, scales, bits
        self.shape, self.device = base.shape, base.device

    def numel(self) -> int:
        return self._base.numel()

    def __getitem__(self, block: Any) -> Tensor:
        rows, columns = block if isinstance(block, tuple) else (block, slice(None))
        start, stop, _ = columns.indices(self.shape[1])
        first, last = start // BLOCK, -(-stop // BLOCK)
        codes = self._codes[rows, first * BLOCK * self._bits // 8 : last * BLOCK * self._bits // 8]
        numbers = codes.view(torch.int8) if self._bits == 8 else _unpack(codes)
        numbers = pad(numbers.float(), (0, (last - first) * BLOCK - numbers.shape[1]))
        tiles = numbers.view(len(codes), -1, BLOCK) * self._scales[rows, first:last, None]
        delta = tiles.flatten(1)[:, start - first * BLOCK : stop - first * BLOCK]
        return self._base[rows, columns].float() + delta

    def symbol(self, tape: Tape) -> Symbol:
        """See kernels.Recordable."""
        numbers = tape.read(self._codes.view(torch.int8)) if self._bits == 8 else self._halves(tape)
        found: Symbol = symbol_of(self._base, tape) + numbers * tape.tiles(self._scales, (1, BLOCK))  # type: ignore[operator]
        return found

    def _halves(self, tape: Tape) -> Symbol:
        if self.shape[1] % 2:
            raise Untraceable("cannot record 4-bit differences in rows of an odd length")
        return tape.read_halves(self._codes)


@dataclass(frozen=True)
class LowRankDelta:
    """A product of two thin matrices."""

    rank: int

    def n_bytes(self, shape: tuple[int, int]) -> int:
        """See Compression."""
        return 4 * min(self.rank, *shape) * sum(shape)

    def scratch_bytes(self, shape: tuple[int, int]) -> int:
        """See Compression: the whole matrix in float32, too."""
        return 4 * shape[0] * shape[1] + _SCRATCH

    def compress(self, delta: Callable[[Block], Tensor], like: Operand) -> tuple[Tensor, ...]:
        """Float32 factors (R, r) and (r, C), rounded to 21 bits so that their products are exact (see low_rank.py)."""
        whole = torch.empty(tuple(like.shape), device=like.device)
        for block in blocks(like, _CHUNK):
            whole[block] = delta(block)
        devices = [like.device] if like.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(whole, min(self.rank + OVERSAMPLING, *whole.shape), ITERATIONS)
        left, right = u[:, : self.rank] * s[: self.rank], v[:, : self.rank].T
        return fixed_point(left, 1), fixed_point(right, 0)

    def donor(self, base: Operand, kept: Sequence[Tensor]) -> Operand:
        """See Compression."""
        return LowRankSum(base, kept[0], kept[1])

    def check(self, shape: tuple[int, int], region: Region) -> None:
        """See Compression."""
        raise EncodingError("low-rank differences cannot be had of shards: expected deltas exact, int8 or int4")


class Deltas:
    """The compressed donors of a search, made when first asked for and then kept.

    Args:
        compression: how.
    """

    def __init__(self, compression: Compression) -> None:
        self._compression = compression
        self.on_device = True
        """Whether they are kept where they are merged; else in the host's memory."""
        self._kept: dict[Any, tuple[Tensor, ...]] = {}
        self._sums: dict[str, tuple[float, float]] = {}
        self._memory = GivingBack(_GIVE_BACK_BYTES)

    def covers(self, shape: tuple[int, int]) -> bool:
        """Whether the differences of a matrix are compressed: not those of vectors, and only if it saves memory."""
        return shape[0] > 1 and self._compression.n_bytes(shape) < 2 * shape[0] * shape[1]

    def n_bytes(self, shapes: Iterable[tuple[int, int]]) -> int:
        """Of one donor's differences, of those of these matrices that are covered."""
        return sum(self._compression.n_bytes(shape) for shape in shapes if self.covers(shape))

    def check(self, shape: tuple[int, int], region: Region) -> None:
        """See Compression."""
        if self.covers(shape):
            self._compression.check(shape, region)

    def donor(
        self, source: str, part: Any, base: Operand, exact: Callable[[], Operand], region: Region | None = None
    ) -> Operand:
        """A donor, or a region of one, as it is compressed.

        Args:
            source: its name.
            part: a part that is covered.
            base: the same of the base.
            exact: reads the donor's; called the first time.
            region: rows and columns of the part's matrix; None for all of it.
        """
        key = (source, part, region and tuple((s.start, s.stop) for s in region))
        if key not in self._kept:
            self._kept[key] = self._compress(source, base, exact())
        return self._compression.donor(base, [tensor.to(base.device) for tensor in self._kept[key]])

    def passing(self, base: Operand, donor: Operand) -> Operand:
        """A donor as it is compressed, which is not kept."""
        return self._compression.donor(base, self._kept_of(base, donor))

    def _kept_of(self, base: Operand, donor: Operand) -> tuple[Tensor, ...]:
        return self._compression.compress(lambda block: donor[block].float() - base[block].float(), base)

    @property
    def errors(self) -> Mapping[str, float]:
        """Source -> ||compressed - exact||_F / ||exact||_F over all differences that have been compressed so far."""
        return {name: (error / norm) ** 0.5 if norm else 0.0 for name, (error, norm) in self._sums.items()}

    def _compress(self, source: str, base: Operand, donor: Operand) -> tuple[Tensor, ...]:
        kept = self._kept_of(base, donor)
        compressed, (error, norm) = self._compression.donor(base, kept), self._sums.get(source, (0.0, 0.0))
        for block in blocks(base, _CHUNK):
            exact = donor[block].double() - base[block].double()
            error += float((compressed[block].double() - base[block].double() - exact).square().sum())
            norm += float(exact.square().sum())
        self._sums[source] = (error, norm)
        self._memory.looked_at(4 * base.numel())
        return kept if self.on_device else tuple(tensor.cpu() for tensor in kept)
