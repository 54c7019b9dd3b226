"""MXFP4 as gpt-oss stores it (OCP Microscaling Formats v1.0): read exactly, and written as bfloat16.

32 numbers along the last dimension share a scale, a power of two (E8M0, bias 127). A byte of `NAME_blocks` holds
two E2M1 numbers, the lower half first; `NAME_scales` has the scales. The tensor that the model calls NAME is the
transpose of what is stored: (experts, in, out) of blocks (experts, out, in / 32, 16).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evo.encodings import EncodingError, Entry, TensorHeader, Values, Watcher, cut_units
from evo.encodings.plain import Plain
from evo.merge.blocks import Operand, Region

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the codes 0 to 7; codes 8 to 15 are their negatives."""
_CODES = (*E2M1, *(-x for x in E2M1))
_PAIRS = tuple((lower, upper) for upper in _CODES for lower in _CODES)
"""The two numbers of each byte: looked up a byte at a time, they need neither halves nor as many indices."""
GROUP = 32
"""Numbers that share a scale."""
BLOCKS, SCALES = "_blocks", "_scales"
"""What the names of the two pieces end in."""
NAN_SCALE = 255


@dataclass(frozen=True)
class Mxfp4:
    """See evo.encodings.Encoding."""

    suffixes = (BLOCKS, SCALES)
    is_float = True

    def __str__(self) -> str:
        return "MXFP4"

    @property
    def output(self) -> Plain:
        """See Encoding. Every value is a bfloat16 number, so this loses nothing."""
        return Plain("BF16")

    def shape(self, pieces: Sequence[Tensor]) -> tuple[int, ...]:
        """See Encoding."""
        return _shape(pieces[0].shape)

    def operand(self, pieces: Sequence[Tensor]) -> Operand:
        """See Encoding. One expert is decoded whole, to bfloat16, whenever it is merged: to keep that would take almost
        four times the bytes of what is stored.
        """
        return values_of(*pieces)

    def cut(self, shape: Sequence[int], region: Region) -> tuple[tuple[slice, ...], ...]:
        """See Encoding. What is stored is the transpose."""
        stored = cut_units(region, shape, (GROUP, 1))[::-1]
        return stored, stored

    def encode(
        self, shape: Sequence[int], device: torch.device, values: Values, chunk: int, watch: Watcher | None = None
    ) -> tuple[Tensor, ...]:
        """Never called: a merge is stored as `output`."""
        raise NotImplementedError("MXFP4 is read only")

    def decode(self, pieces: Sequence[Tensor], target: Tensor, chunk: int) -> None:
        """See Encoding."""
        target.copy_(values_of(*pieces))


def values_of(blocks: Tensor, scales: Tensor) -> Tensor:
    """Decode.

    Args:
        blocks: uint8 (..., out, groups, 16).
        scales: uint8 (..., out, groups); 255 means NaN.

    Returns:
        bfloat16 (..., in, out).
    """
    pairs = torch.tensor(_PAIRS, dtype=torch.bfloat16, device=blocks.device)
    numbers = pairs.index_select(0, blocks.flatten().int()).view(*blocks.shape[:-1], GROUP)
    powers = torch.where(scales == NAN_SCALE, torch.nan, torch.exp2(scales.double() - 127)).to(torch.bfloat16)
    return numbers.mul_(powers[..., None]).flatten(-2).transpose(-1, -2).contiguous()


def find(headers: Mapping[str, TensorHeader], quantization: Mapping[str, Any]) -> Iterator[Entry]:
    """See evo.encodings.FINDERS.

    Raises:
        EncodingError: if blocks and scales do not fit each other.
    """
    for piece, blocks in headers.items():
        name = piece.removesuffix(BLOCKS)
        if name == piece or blocks.dtype != "U8":
            continue
        scales = headers.get(name + SCALES)
        fits = len(blocks.shape) >= 3 and blocks.shape[-1] == GROUP // 2
        if scales is None or not fits or scales != TensorHeader("U8", blocks.shape[:-1]):
            raise EncodingError(
                f"{name}: expected {BLOCKS} of shape (experts, out, groups, {GROUP // 2}) and {SCALES} of "
                f"shape (experts, out, groups), both uint8, got {blocks} and {scales}"
            )
        yield Entry(name, _shape(blocks.shape), Mxfp4())


def _shape(blocks: Sequence[int]) -> tuple[int, ...]:
    *packed, n_out, n_groups, _ = blocks
    return (*packed, n_groups * GROUP, n_out)
