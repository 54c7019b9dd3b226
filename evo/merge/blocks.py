"""A part as a matrix, and the matrix in blocks, so that temporaries stay small however large a tensor is."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Block = tuple[slice, slice]
"""Rows and columns. The elements of a block are consecutive in the matrix: it takes whole rows, or a piece of one."""

Region = tuple[slice, slice]
"""Any rows and columns, both slices with start and stop: what one process of several holds of a matrix."""


class Operand(Protocol):
    """What a merge reads: a matrix (R, C), of which a block is a tensor of floats. A matrix of torch is one; others
    make a block's floats out of what is stored when they are asked for it.
    """

    @property
    def shape(self) -> torch.Size:
        """(R, C)."""

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""

    def numel(self) -> int:
        """R C."""

    def __getitem__(self, block: Any, /) -> Tensor:
        """A Block, or a slice of whole rows. It may be a view: copy it before changing it."""


def as_matrix(tensor: Tensor) -> Tensor:
    """Shape (R, C): R is the first dimension; a vector or a number is one row. A view where the layout allows it."""
    return tensor.reshape(matrix_shape(tensor.shape))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(R, C) of a tensor's matrix."""
    n_rows = shape[0] if len(shape) > 1 else 1
    return n_rows, math.prod(shape) // max(1, n_rows)


def cut_shape(shape: Sequence[int], region: Region) -> tuple[int, ...]:
    """Shape of a tensor's region: that of the tensor with fewer rows, or (r, c); a vector stays one."""
    (height, width), (_, n_columns) = (s.stop - s.start for s in region), matrix_shape(shape)
    if width == n_columns and len(shape) != 1:
        return (height, *shape[1:]) if shape else ()
    return (height, width) if len(shape) > 1 else (width,)


def blocks(matrix: Operand, size: int) -> Iterator[Block]:
    """Cut a matrix into blocks of at most `size` elements, in the order of the elements."""
    n_rows, n_columns = matrix.shape
    height, width = max(1, size // max(1, n_columns)), max(1, size)
    for top in range(0, n_rows, height):
        for left in range(0, n_columns, width):
            yield slice(top, min(top + height, n_rows)), slice(left, min(left + width, n_columns))
