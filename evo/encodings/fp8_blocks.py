"""DeepSeek's FP8 (arXiv 2412.19437, section 3.3): E4M3 numbers with one scale for each block of 128 x 128.

    value = number * scale,    scale = max |value| over the block / 448,    number = round(value / scale)

A tensor `NAME` has its scales beside it as `NAME_scale_inv` (so `X.weight` has `X.weight_scale_inv`), float32, or
bfloat16 in Qwen's checkpoints. With `scale_fmt: ue8m0` they are rounded up to powers of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from evo.encodings import EncodingError, Entry, TensorHeader, Values, Watcher, cut_units
from evo.encodings.plain import DTYPES
from evo.merge.blocks import Operand, Region, blocks
from evo.merge.kernels import compute
from evo.merge.scaled import Scaled
from evo.merge.tape import Symbol, Tape

LARGEST = 448.0
"""The largest E4M3 number."""
HELD_ELEMENTS = {"cuda": 1 << 23}
"""Kind of device -> how many values it holds in float32 while they are rounded, if not one band of blocks: a GPU takes
longer to be asked for a band than to round it."""
_SUFFIX = "_scale_inv"
_MANTISSA = (1 << 23) - 1


@dataclass(frozen=True)
class Fp8Blocks:
    """See evo.encodings.Encoding. Matrices only, or packed stacks of them."""

    block: tuple[int, int] = (128, 128)
    """Rows and columns that share a scale; the last ones may be fewer."""
    powers_of_two: bool = False
    """Whether scales are powers of two (ue8m0)."""
    scale_dtype: str = "F32"

    suffixes = ("", _SUFFIX)
    is_float = True

    def __str__(self) -> str:
        scales = "powers of two" if self.powers_of_two else self.scale_dtype
        return f"F8_E4M3 with scales for {self.block[0]} x {self.block[1]} ({scales})"

    @property
    def output(self) -> Fp8Blocks:
        """See Encoding."""
        return self

    def shape(self, pieces: Sequence[Tensor]) -> tuple[int, ...]:
        """See Encoding."""
        return tuple(pieces[0].shape)

    def operand(self, pieces: Sequence[Tensor]) -> Operand:
        """See Encoding."""
        return Scaled(pieces[0], pieces[1], self.block)

    def cut(self, shape: Sequence[int], region: Region) -> tuple[tuple[slice, ...], ...]:
        """See Encoding."""
        return region, cut_units(region, shape, self.block)

    def encode(
        self, shape: Sequence[int], device: torch.device, values: Values, chunk: int, watch: Watcher | None = None
    ) -> tuple[Tensor, ...]:
        """See Encoding. A band of blocks at a time is held in float32, or several."""
        numbers = torch.empty(tuple(shape), dtype=torch.float8_e4m3fn, device=device)
        scales = torch.empty(grid(shape, self.block), dtype=DTYPES[self.scale_dtype], device=device)
        n_bands = max(1, HELD_ELEMENTS.get(device.type, 0) // (self.block[0] * shape[1]))
        for i in range(0, len(scales), n_bands):
            top, height = i * self.block[0], n_bands * self.block[0]
            band = _band(values, top, min(height, shape[0] - top), shape[1], device, chunk)
            pieces = numbers[top : top + len(band)], scales[i : i + n_bands]
            pieces[1].copy_(self._scales(self._tiles(band).abs().amax(1).amax(2)))
            self._round(band, pieces)
            if watch:
                stored = torch.empty_like(band)
                self.decode(pieces, stored, chunk)
                watch(band, stored)
        return numbers, scales

    def decode(self, pieces: Sequence[Tensor], target: Tensor, chunk: int) -> None:
        """See Encoding."""
        operand = Scaled(pieces[0], pieces[1], self.block)

        def on_tensors(to: Tensor) -> None:
            for block in blocks(operand, chunk):
                to[block] = operand[block]

        compute(operand.symbol, on_tensors, target)

    def _round(self, band: Tensor, pieces: tuple[Tensor, Tensor]) -> None:
        """A band (r, C) to numbers in units of the scales (r / height, C / width) that are there."""
        numbers, scales = pieces

        def write_down(tape: Tape) -> Symbol:
            units: Symbol = tape.read(band) / tape.tiles(scales, self.block)  # type: ignore[operator]
            return units.clamp_(-LARGEST, LARGEST)

        def on_tensors(to: Tensor) -> None:
            divided = (self._tiles(band) / scales.float()[:, None, :, None]).clamp_(-LARGEST, LARGEST)
            to.copy_(divided.flatten(2).flatten(0, 1)[: band.shape[0], : band.shape[1]])

        compute(write_down, on_tensors, numbers)

    def _tiles(self, band: Tensor) -> Tensor:
        """(r / height, height, C / width, width), with zeros where the last ones are not full."""
        (height, width), (n_rows, n_columns) = self.block, band.shape
        if any(missing := (0, -n_columns % width, 0, -n_rows % height)):
            band = pad(band, missing)
        return band.view(len(band) // height, height, -1, width)

    def _scales(self, largest: Tensor) -> Tensor:
        """A scale for each block's largest magnitude; 1 for a block of zeros."""
        scales = largest / torch.full_like(largest, LARGEST)  # by a tensor: CUDA multiplies by a number's reciprocal
        if self.powers_of_two:
            bits = (scales.view(torch.int32) + _MANTISSA) & ~_MANTISSA
            scales = torch.where(torch.isfinite(scales), bits.view(torch.float32), scales)
        scales = scales.to(DTYPES[self.scale_dtype])
        return torch.where(scales == 0.0, 1.0, scales)


def holds_nan(numbers: Tensor) -> bool:
    """Whether any E4M3 number is none: 0x7f is the largest of all as a signed byte, 0xff as an unsigned one."""
    if not numbers.numel():
        return False
    return int(numbers.view(torch.int8).max()) == 0x7F or int(numbers.view(torch.uint8).max()) == 0xFF


def grid(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """Shape of the table of scales."""
    *packed, rows, columns = shape
    return (*packed, math.ceil(rows / block[0]), math.ceil(columns / block[1]))


def find(headers: Mapping[str, TensorHeader], quantization: Mapping[str, Any]) -> Iterator[Entry]:
    """See evo.encodings.FINDERS.

    Raises:
        EncodingError: if scales are missing or do not fit the blocks.
    """
    block = quantization.get("weight_block_size") or (128, 128)
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise EncodingError(f"quantization_config.weight_block_size: expected two numbers above 0, got {block!r}")
    powers_of_two = quantization.get("scale_fmt") == "ue8m0"
    for name, header in headers.items():
        if header.dtype != "F8_E4M3":
            continue
        scales = headers.get(name + _SUFFIX)
        if scales is None:
            raise EncodingError(
                f"{name} is FP8 without a table of scales: expected {name}{_SUFFIX} beside it. Other kinds of FP8 "
                "are not read; take a bfloat16 version of this checkpoint, or one in DeepSeek's FP8."
            )
        matrices = len(header.shape) == 2 or (len(header.shape) == 3 and ".experts." in name)
        expected = grid(header.shape, block) if matrices else None
        if scales.dtype not in ("F32", "BF16") or scales.shape != expected:
            raise EncodingError(
                f"{name}{_SUFFIX}: expected {expected} float32 numbers, one for each block of {block[0]} x {block[1]} "
                f"of {header.shape} (config.json: quantization_config.weight_block_size), got {scales.dtype} "
                f"{scales.shape}"
            )
        yield Entry(name, header.shape, Fp8Blocks((block[0], block[1]), powers_of_two, scales.dtype))


def _band(values: Values, top: int, height: int, width: int, device: torch.device, chunk: int) -> Tensor:
    """Values of whole rows, asked for in blocks of the usual size."""
    rows = slice(top, top + height)
    if height * width <= chunk:
        return values((rows, slice(0, width)))
    band = torch.empty(height, width, device=device)
    for at, columns in blocks(band, chunk):
        band[at, columns] = values((slice(top + at.start, top + at.stop), columns))
    return band
