"""Bytes that a merge takes for a while beside model and sources: what is made of a part on the way to where it goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from evo.checkpoint import Checkpoint
from evo.encodings import ITEM_BYTES, Encoding
from evo.encodings.fp8_blocks import HELD_ELEMENTS, Fp8Blocks
from evo.encodings.low_rank import LowRank
from evo.encodings.mxfp4 import Mxfp4
from evo.encodings.plain import DTYPES, Plain
from evo.merge import get_method
from evo.merge.kernels import FUSE_FROM_ELEMENTS
from evo.parallel import own_parts, part_shape
from evo.planning.footprint import MIB
from evo.vocabulary import CommonRows
from search_spaces.layout import Part

MERGE_BYTES = 8 * MIB
"""Blocks of a merge that measures nothing (experiments/benchmarks)."""
FIRST_BAND, FIRST_SLOT = 13, 12
"""Bytes of a number of FP8 while the loops that round a band, and decode a part, are first compared with the same on
tensors: both results, where they are equal, and one of them in float32, beside the band, or what is encoded.
"""


def merge_bytes(
    method: str,
    interface: Checkpoint,
    sources: Mapping[str, Checkpoint],
    common: Mapping[str, CommonRows],
    dtype: str,
    device: str,
) -> int:
    """Of the part that takes most. Methods that measure whole parts hold up to two of the largest in float32.

    Args:
        method: of the space.
        interface: the interface parent.
        sources: what is merged.
        common: tensors of which the sources have some rows in common.
        dtype: of the resident model.
        device: "gpu" or "host".
    """
    measured = 8 if get_method(method).measure else 0
    most, checked = 0, device != "gpu"
    for part in own_parts(interface):
        shape, stored = part_shape(interface, part), [_stored(source, part) for source in sources.values()]
        n, made = math.prod(shape), 0
        if device == "gpu":
            made = _made_bytes(shape, stored, common.get(part.tensor), dtype)
        if not checked and n >= FUSE_FROM_ELEMENTS and any(isinstance(one, Fp8Blocks) for one in stored):
            made, checked = max(made, _first_bytes(shape)), True
        n_decoded = sum(isinstance(one, Mxfp4) for one in stored)
        decoding = 2 * n if n_decoded else 0  # what the last one is looked up by, while the others are there
        most = max(most, 2 * n * n_decoded + max(measured * n, made, decoding))
    return MERGE_BYTES + most


def _stored(source: Checkpoint, part: Part) -> Encoding:
    """How, beneath what an adapter adds."""
    encoding = source.entries[part.tensor].encoding
    while isinstance(encoding, LowRank):
        encoding = encoding.inner
    return encoding


def _made_bytes(shape: Sequence[int], stored: Sequence[Encoding], rows: CommonRows | None, dtype: str) -> int:
    """Of a part on a GPU, as it is stored, before it is written to the model: where a loop cannot write it there."""
    n, found = math.prod(shape), 0
    for output in (encoding.output for encoding in stored):
        if isinstance(output, Fp8Blocks):
            copies = 3 if shape[-2] % output.block[0] or shape[-1] % output.block[1] else 2
            found = max(found, n + 4 * copies * _held(shape))  # the band, its magnitudes, and it with full blocks
        elif isinstance(output, Plain) and rows is not None:  # those that are merged, and all
            found = max(found, ITEM_BYTES[output.dtype] * (n + rows.n_rows * n // shape[0]))
        elif len(shape) > 1 and isinstance(output, Plain) and DTYPES.get(output.dtype) != getattr(torch, dtype):
            # not of a vector, which is small, and stays float32 in some models whatever is asked for
            found = max(found, ITEM_BYTES[output.dtype] * n)
    return found


def _first_bytes(shape: Sequence[int]) -> int:
    """Of the first part of FP8 on a GPU, whose loops nobody has looked at yet."""
    n = math.prod(shape)
    return max(n + FIRST_BAND * _held(shape), FIRST_SLOT * n)


def _held(shape: Sequence[int]) -> int:
    """Numbers of FP8 that a GPU holds in float32 while they are rounded."""
    return min(math.prod(shape), max(128 * shape[-1], HELD_ELEMENTS["cuda"]))
