"""A part as a matrix, and the matrix in blocks, so that temporaries stay small however large a tensor is."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

Block = tuple[slice, slice]
"""Rows and columns. The elements of a block are consecutive in the matrix: it takes whole rows, or a piece of one."""


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
    n_rows = tensor.shape[0] if tensor.ndim > 1 else 1
    return tensor.reshape(n_rows, tensor.numel() // max(1, n_rows))


def blocks(matrix: Operand, size: int) -> Iterator[Block]:
    """Cut a matrix into blocks of at most `size` elements, in the order of the elements."""
    n_rows, n_columns = matrix.shape
    height, width = max(1, size // max(1, n_columns)), max(1, size)
    for top in range(0, n_rows, height):
        for left in range(0, n_columns, width):
            yield slice(top, min(top + height, n_rows)), slice(left, min(left + width, n_columns))
