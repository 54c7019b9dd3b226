"""One part, or a region of it, merged: block by block on tensors, or by a compiled loop in one pass.

Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evo.merge import Method
from evo.merge.blocks import Block, Operand, blocks
from evo.merge.kernels import Fused, fuse, log
from evo.merge.noise import Key, uniforms, uniforms_of_rows

FUSE_FROM_ELEMENTS = 1 << 16
"""Smaller parts are not worth compiling a loop for."""
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
        return self.method.merge(floats, self.base[block].float(), self.coefficients, **arguments)

    def compiled(self) -> Fused | None:
        """The compiled loop that does the same, if there is one and it has the same bits."""
        tensors = [operand for operand in (self.base, *self.donors) if isinstance(operand, Tensor)]
        if len(tensors) <= len(self.donors):
            return None
        large, first, arguments = self.base.numel() >= FUSE_FROM_ELEMENTS, 0, self.arguments
        if self.width in (None, self.base.shape[1]):
            first = self.corner[0] * self.base.shape[1]
        elif self.method.random:  # a loop numbers noise by runs of consecutive elements
            return None
        else:
            arguments = self._arguments_at(slice(0, self.base.shape[0]))
        fused = fuse(self.method, tensors, self.coefficients, arguments, self.keys, may_compile=large, first=first)
        if fused is not None and fused.loop.is_right is None:
            fused.loop.is_right = self._has_same_bits(fused)
        return fused if fused is not None and fused.loop.is_right else None

    def _has_same_bits(self, fused: Fused) -> bool:
        """Compare the first block. A compiler that does not keep to the rules must not change a merge."""
        expected = self.block(next(blocks(self.base, _CHECKED_ELEMENTS))).to(fused.dtype).contiguous()
        found = torch.empty_like(expected)
        try:
            fused.run(found)
        except Exception as error:  # of whatever kind: compilers of GPU code, which run late, have many
            log.warning("the compiled loop of a merge does not run, and is not used: %s", error)
            return False
        integers = torch.int32 if found.element_size() == 4 else torch.int16
        same = (found.view(integers) == expected.view(integers)) | (found.isnan() & expected.isnan())
        if not same.all():
            log.warning("the compiled loop of a merge has other bits than the merge on tensors, and is not used")
        return bool(same.all())

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
