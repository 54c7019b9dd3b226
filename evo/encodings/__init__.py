"""How checkpoints store a tensor: what a merge reads of it, and how a merge's result is stored. One a file.

A tensor of the model is stored as one or several *pieces*, tensors of a file: DeepSeek's FP8 weights have a table
of scales beside them. All pieces of a packed tensor (experts, ...) have the experts as their first dimension.
Knows nothing of folders; each encoding knows the names of its pieces.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from evo.merge.blocks import Block, Operand, Region

FINDERS = {
    "fp8_blocks": "evo.encodings.fp8_blocks:find",
    "mxfp4": "evo.encodings.mxfp4:find",
    "plain": "evo.encodings.plain:find",
}
"""Name -> function, as "module:attribute": find(headers, quantization) gives the entries that it recognises among
the tensors that those before it have left over. `quantization` is config.json's quantization_config, or {}."""

Values = Callable[[Block], Tensor]
"""The float32 values of a block of a matrix (R, C)."""
Watcher = Callable[[Tensor, Tensor], None]
"""Told of every band of a matrix: its float32 values, and what is left of them once they are stored."""


ITEM_BYTES = {
    "C64": 8, "U64": 8, "I64": 8, "F64": 8, "F32": 4, "U32": 4, "I32": 4, "BF16": 2, "F16": 2, "U16": 2, "I16": 2,
    "F8_E8M0": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of a number, by dtype, in the order in which safetensors writes tensors: wide ones first keeps all aligned."""


class EncodingError(ValueError):
    """Tensors are stored in a way that cannot be read."""


@dataclass(frozen=True)
class TensorHeader:
    """What a file says of a tensor before its bytes are read."""

    dtype: str
    """As safetensors writes it: "F32", "BF16", ..."""
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Of the tensor."""
        return math.prod(self.shape) * ITEM_BYTES.get(self.dtype, 1)


class Encoding(Protocol):
    """How a tensor is stored. Encodings are equal where the same bits mean the same values."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """A tensor's name followed by one of these is the name of a piece."""

    @property
    def is_float(self) -> bool:
        """Whether it stands for numbers that can be merged."""

    @property
    def output(self) -> Encoding:
        """How a merge of such tensors is stored: itself, if it can be written."""

    def shape(self, pieces: Sequence[Tensor]) -> tuple[int, ...]:
        """Shape of the tensor that is stored as these pieces."""

    def operand(self, pieces: Sequence[Tensor]) -> Operand:
        """The tensor as a matrix; its first dimension is R."""

    def cut(self, shape: Sequence[int], region: Region) -> tuple[tuple[slice, ...], ...]:
        """Where in each piece of a tensor of this shape a region of its matrix is; that is a tensor stored alike.

        Raises:
            EncodingError: if the region does not end where numbers can be told apart from their neighbours.
        """

    def encode(
        self, shape: Sequence[int], device: torch.device, values: Values, chunk: int, watch: Watcher | None = None
    ) -> tuple[Tensor, ...]:
        """Round values once, to pieces of a tensor of this shape. Asks for blocks of at most `chunk` elements."""

    def decode(self, pieces: Sequence[Tensor], target: Tensor, chunk: int) -> None:
        """Write the stored values into a tensor of the same shape, in its dtype."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint."""

    name: str
    """What the model calls it."""
    shape: tuple[int, ...]
    encoding: Encoding

    @property
    def pieces(self) -> tuple[str, ...]:
        """Names of the tensors of the file that it is stored as."""
        return tuple(self.name + suffix for suffix in self.encoding.suffixes)


@dataclass(frozen=True)
class Stored:
    """A tensor, or one row of it, as a checkpoint stores it."""

    encoding: Encoding
    pieces: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that it stands for."""
        return self.encoding.shape(self.pieces)

    @property
    def operand(self) -> Operand:
        """What a merge reads. Made anew each time: of MXFP4 it is a copy that is almost four times as large as what is
        stored, which must not stay for as long as this does; of other encodings it is a view.
        """
        return self.encoding.operand(self.pieces)

    def as_output(self, chunk: int) -> Stored:
        """As a merge would be stored: the same bits, if this encoding can be written."""
        output = self.encoding.output
        if output == self.encoding:
            return self
        operand = self.operand
        return Stored(output, output.encode(self.shape, operand.device, lambda block: operand[block].float(), chunk))

    def to(self, device: torch.device | str) -> Stored:
        """The same bits on a device."""
        return Stored(self.encoding, tuple(piece.to(device) for piece in self.pieces))


def stack(rows: Sequence[Stored]) -> Stored:
    """A packed tensor from its rows, which are all stored alike."""
    pieces = zip(*(row.pieces for row in rows), strict=True)
    return Stored(rows[0].encoding, tuple(map(torch.stack, pieces)))


def cut_units(region: Region, shape: Sequence[int], unit: tuple[int, int]) -> Region:
    """A region of a matrix in units of rows and columns; the last units may be fewer.

    Raises:
        EncodingError: if it cuts through one.
    """
    for part, n, size in zip(region, shape, unit, strict=True):
        if part.start % size or (part.stop % size and part.stop != n):
            raise EncodingError(
                f"expected shards that end at multiples of {unit[0]} rows and {unit[1]} columns, whose numbers are "
                f"stored together, got {region[0].start}:{region[0].stop} and {region[1].start}:{region[1].stop}"
            )
    rows, columns = (slice(s.start // u, -(-s.stop // u)) for s, u in zip(region, unit, strict=True))
    return rows, columns


def find_entries(headers: Mapping[str, TensorHeader], quantization: Mapping[str, Any]) -> dict[str, Entry]:
    """Tensors of a checkpoint by name, in the order of their first pieces.

    Args:
        headers: names of all tensors of the files -> header.
        quantization: config.json's quantization_config, or {}.

    Raises:
        EncodingError: with the tensors that no encoding reads.
    """
    left, found = dict(headers), {}
    for finder in FINDERS.values():
        for entry in list(pkgutil.resolve_name(finder)(left, quantization)):
            found[entry.name] = entry
            for piece in entry.pieces:
                del left[piece]
    order = {name: i for i, name in enumerate(headers)}
    return {entry.name: entry for entry in sorted(found.values(), key=lambda e: min(order[p] for p in e.pieces))}
