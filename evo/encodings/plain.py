"""Numbers stored one by one: float32, float16, bfloat16 (and whatever else a checkpoint copies through)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evo.encodings import EncodingError, Entry, TensorHeader, Values, Watcher
from evo.merge.blocks import Operand, Region, as_matrix, blocks, matrix_shape

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Plain:
    """See evo.encodings.Encoding."""

    dtype: str
    """As safetensors writes it."""
    to: str | None = None
    """In which dtype a merge is stored, where that is another."""

    suffixes = ("",)

    def __str__(self) -> str:
        return self.dtype

    @property
    def is_float(self) -> bool:
        """See Encoding."""
        return self.dtype in DTYPES

    @property
    def output(self) -> Plain:
        """See Encoding."""
        return Plain(self.to) if self.to else self

    def shape(self, pieces: Sequence[Tensor]) -> tuple[int, ...]:
        """See Encoding."""
        return tuple(pieces[0].shape)

    def operand(self, pieces: Sequence[Tensor]) -> Operand:
        """See Encoding."""
        return as_matrix(pieces[0])

    def cut(self, shape: Sequence[int], region: Region) -> tuple[tuple[slice, ...], ...]:
        """See Encoding."""
        if len(shape) < 3:
            return (region[2 - len(shape) :],)
        if (region[1].start, region[1].stop) != (0, matrix_shape(shape)[1]):  # its step is 1 or None
            raise EncodingError(f"expected shards of whole rows of a tensor of shape {list(shape)}, got {region[1]}")
        return (region[:1],)

    def encode(
        self, shape: Sequence[int], device: torch.device, values: Values, chunk: int, watch: Watcher | None = None
    ) -> tuple[Tensor, ...]:
        """See Encoding. Each number is rounded to the nearest; nobody is told."""
        tensor = torch.empty(tuple(shape), dtype=DTYPES[self.dtype], device=device)
        matrix = as_matrix(tensor)
        for block in blocks(matrix, chunk):
            matrix[block] = values(block)
        return (tensor,)

    def decode(self, pieces: Sequence[Tensor], target: Tensor, chunk: int) -> None:
        """See Encoding."""
        target.copy_(pieces[0])


def find(headers: Mapping[str, TensorHeader], quantization: Mapping[str, Any]) -> Iterator[Entry]:
    """See evo.encodings.FINDERS. What is no float can be copied, but not merged."""
    for name, header in headers.items():
        yield Entry(name, header.shape, Plain(header.dtype))
