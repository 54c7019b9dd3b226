"""One part, or a region of it, merged: block by block on tensors, or by a compiled loop in one pass.

Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evo.merge import Method, kernels
from evo.merge.blocks import Block, Operand, blocks
from evo.merge.kernels import Fused, fuse, is_right
from evo.merge.noise import Key, uniforms, uniforms_of_rows

_CHECKED_ELEMENTS = 1 << 18


@dataclass(eq=False, slots=True)
class PartMerge:
    """A merge of one part, or of a region of it.

    Letters: the operands are matrices (R, C), see blocks.py.
    """

    method: Method
    base: Operand
    """Shape (R, C)."""
    donors: Sequence[Operand]
    """D matrices (R, C)."""
    coefficients: Sequence[float]
    """D numbers."""
    arguments: Mapping[str, Any]
    """Of the method's merge: knobs, and `stats` of the whole part where it measures."""
    keys: Sequence[Key]
    """D streams of noise, for a random method."""
    corner: tuple[int, int] = (0, 0)
    """Row and column of the part's matrix where the region starts."""
    width: int | None = None
    """Columns of the part's matrix; None for as many as the operands have."""

    def block(self, block: Block) -> Tensor:
        """A block of the merge on tensors, shape (r, c), float32."""
        arguments = self._arguments_at(block[0])
        if self.method.random:
            arguments["noise"] = [self._noise(key, block) for key in self.keys]
        floats = [donor[block].float() for donor in self.donors]
        base = self.base[block].float()
        merged = self.method.merge(floats, base, self.coefficients, **arguments)
        if not isinstance(merged, Tensor) or (merged.shape, merged.dtype) != (base.shape, torch.float32):
            got = f"{merged.dtype} {list(merged.shape)}" if isinstance(merged, Tensor) else type(merged).__name__
            name = self.method.merge.__name__
            raise TypeError(
                f"merge method {name}: expected a float32 tensor {list(base.shape)}, like the base, got {got}"
            )
        return merged

    def compiled(self, dtype: torch.dtype) -> Fused | None:
        """The compiled loop that does the same, if there is one and it has the same bits.

        Args:
            dtype: of the result.
        """
        operands = (self.base, *self.donors)
        large, first, arguments = self.base.numel() >= kernels.FUSE_FROM_ELEMENTS, 0, self.arguments
        if self.width in (None, self.base.shape[1]):
            first = self.corner[0] * self.base.shape[1]
        elif self.method.random:  # a loop numbers noise by runs of consecutive elements
            return None
        else:
            arguments = self._arguments_at(slice(0, self.base.shape[0]))
        given = self.method, operands, self.coefficients, arguments, self.keys
        fused = fuse(*given, may_compile=large, first=first, dtype=dtype)
        if fused is None:
            return None
        right = is_right(fused, lambda: self.block(next(blocks(self.base, _CHECKED_ELEMENTS))).to(dtype))
        return fused if right else None

    def _arguments_at(self, rows: slice) -> dict[str, Any]:
        """Of rows of the operands."""
        arguments, top = dict(self.arguments), self.corner[0]
        if "stats" in arguments:
            stats, rows = arguments["stats"], slice(top + rows.start, top + rows.stop)
            arguments["stats"] = [s.at(rows) for s in stats] if isinstance(stats, list) else stats.at(rows)
        return arguments

    def _noise(self, key: Key, block: Block) -> Tensor:
        """Uniform numbers for a block, numbered by the elements of the part's matrix."""
        (rows, columns), (top, left), width = block, self.corner, self.width or self.base.shape[1]
        n_rows, n_columns = rows.stop - rows.start, columns.stop - columns.start
        start, device = (top + rows.start) * width + left + columns.start, self.base.device
        if n_rows == 1 or n_columns == width:
            return uniforms(key, start, n_rows * n_columns, device).view(n_rows, n_columns)
        return uniforms_of_rows(key, start, (n_rows, n_columns), width, device)
