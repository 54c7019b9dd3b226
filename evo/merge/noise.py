"""Random numbers that are a function of their place: nothing is drawn in sequence and nothing is stored.

A merge so gets the same mask in every candidate of a search, in whatever blocks and on whatever device it is
computed, and again in the export. Only integer operations are used, whose bits do not depend on the hardware.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor

Key = tuple[int, int]
"""Two numbers of 32 bits that choose a stream."""

# Rounds of xor-shift and multiplication, with the constants of C. Wellons' hash "lowbias32" (2018).
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
_SHIFTS = (16, 15)
_LAST_SHIFT = 16


@functools.lru_cache(1 << 16)
def stream_key(*names: object) -> Key:
    """The stream of a place, such as (seed, donor, tensor, row)."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8).digest()
    return _signed(int.from_bytes(digest[:4], "little")), _signed(int.from_bytes(digest[4:], "little"))


def uniforms(key: Key, start: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """Numbers start to start + n - 1 of a stream: multiples of 2^-16 in [0, 1), float32, shape (n,).

    Each hash of 32 bits makes two numbers. Streams repeat after 2^33 numbers.
    """
    first = start // 2
    x = torch.arange((start + n + 1) // 2 - first, dtype=torch.int32, device=device)
    x += _signed(first & 0xFFFFFFFF)
    return _fractions(_hash(key, x)[start - 2 * first :][:n])


def uniforms_of_rows(key: Key, start: int, shape: tuple[int, int], stride: int, device: torch.device) -> Tensor:
    """Numbers start + stride i + j of a stream, shape (r, c): see `uniforms`."""
    rows = torch.arange(shape[0], device=device) * stride + start
    numbers = rows[:, None] + torch.arange(shape[1], device=device)
    halves = _hash(key, (numbers >> 1).to(torch.int32)).view(*shape, 2)
    return _fractions(halves.gather(2, (numbers & 1)[:, :, None])[:, :, 0])


def _hash(key: Key, x: Tensor) -> Tensor:
    """In place; a number of 32 bits becomes two of 16, neighbours in the last dimension."""
    scratch = torch.empty_like(x)
    for word, shift, multiplier in zip(key, _SHIFTS, _MULTIPLIERS, strict=True):
        x ^= word  # the second in mid-way, else two keys would give one sequence, shifted
        _shift_xor(x, shift, scratch).mul_(_signed(multiplier))
    return _shift_xor(x, _LAST_SHIFT, scratch).view(torch.int16)


def _fractions(halves: Tensor) -> Tensor:
    return halves.float().add_(32768.0).mul_(2.0**-16)


def _shift_xor(x: Tensor, shift: int, scratch: Tensor) -> Tensor:
    """In place x ^ (x >> shift), the shift being that of an unsigned number."""
    torch.bitwise_right_shift(x, shift, out=scratch)
    x ^= scratch.bitwise_and_((1 << (32 - shift)) - 1)
    return x


def _signed(word: int) -> int:
    """The int32 of the same 32 bits."""
    return word - (1 << 32) if word >= 1 << 31 else word
