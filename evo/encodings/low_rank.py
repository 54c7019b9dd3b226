"""A tensor of another encoding plus a product of two thin matrices (LoRA, arXiv 2106.09685): W + L @ R.

The product is never stored, and formed for the block that is read only. So that every device, every loop and every cut
into blocks gives the same bits, factors are rounded to fixed point (see `fixed_point`) and multiplied in float64, where
such sums of products are exact in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evo.encodings import Encoding, Values, Watcher
from evo.merge.blocks import Operand, Region
from evo.merge.kernels import symbol_of
from evo.merge.tape import Symbol, Tape

BITS = 21
MAX_RANK = 1 << (53 - 2 * BITS)
"""Up to here a sum of products of two numbers of 21 bits fits into a float64."""


@dataclass(frozen=True)
class LowRank:
    """See evo.encodings.Encoding. Pieces: those of W, then L (R, r) and R (r, C), both in fixed point."""

    inner: Encoding

    is_float = True

    def __str__(self) -> str:
        return f"{self.inner} with a low-rank difference"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """See Encoding."""
        return (*self.inner.suffixes, ".left", ".right")

    @property
    def output(self) -> Encoding:
        """See Encoding."""
        return self.inner.output

    def shape(self, pieces: Sequence[Tensor]) -> tuple[int, ...]:
        """See Encoding."""
        return self.inner.shape(pieces[:-2])

    def operand(self, pieces: Sequence[Tensor]) -> Operand:
        """See Encoding."""
        return LowRankSum(self.inner.operand(pieces[:-2]), pieces[-2], pieces[-1])

    def cut(self, shape: Sequence[int], region: Region) -> tuple[tuple[slice, ...], ...]:
        """See Encoding."""
        return (*self.inner.cut(shape, region), (region[0], slice(None)), (slice(None), region[1]))

    def encode(
        self, shape: Sequence[int], device: torch.device, values: Values, chunk: int, watch: Watcher | None = None
    ) -> tuple[Tensor, ...]:
        """Never called: a merge is stored as `output`."""
        raise NotImplementedError("low-rank differences are read only")

    def decode(self, pieces: Sequence[Tensor], target: Tensor, chunk: int) -> None:
        """Never called: what is decoded has been stored as `output`."""
        raise NotImplementedError("low-rank differences are read only")


class LowRankSum:
    """A matrix whose low-rank difference is added to a block when it is read: W + L @ R.

    L (R, r) and R (r, C) are float32 and in fixed point, see `fixed_point`.
    """

    def __init__(self, base: Operand, left: Tensor, right: Tensor) -> None:
        self._base, self._left, self._right = base, left, right
        self.shape, self.device = base.shape, base.device

    def numel(self) -> int:
        """R C."""
        return self._base.numel()

    def __getitem__(self, block: Any) -> Tensor:
        rows, columns = block if isinstance(block, tuple) else (block, slice(None))
        difference = self._left[rows].double() @ self._right[:, columns].double()
        return difference.add_(self._base[rows, columns]).float()

    def symbol(self, tape: Tape) -> Symbol:
        """See kernels.Recordable."""
        return tape.add_product(symbol_of(self._base, tape), self._left, self._right)


def fixed_point(factor: Tensor, dim: int) -> Tensor:
    """Round to 21 bits, counted from the largest magnitude along a dimension.

    Returns:
        float32: along the dimension, integers of at most 21 bits times one power of two.
    """
    factor = factor.double()
    exponent = torch.frexp(factor.abs().amax(dim, keepdim=True)).exponent - BITS
    return (factor * power_of_two(-exponent)).round_().mul_(power_of_two(exponent)).float()


def power_of_two(exponent: Tensor) -> Tensor:
    """Float64, by its bits: torch.ldexp takes a power in float32, of which a GPU promises all but the last bits.

    Args:
        exponent: whole numbers from -1022 to 1023.
    """
    return ((exponent.long() + 1023) << 52).view(torch.float64)
