"""Merges in another dtype than their parents, or of parents that are stored in several."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from evo.checkpoint import Checkpoint, CheckpointError
from evo.encodings.low_rank import LowRank
from evo.encodings.plain import Plain
from search_spaces.recipe import DTYPES

NAMES = dict(zip(DTYPES, ("F32", "F16", "BF16"), strict=True))
"""What torch and recipes call a dtype -> as safetensors writes it."""
_KEYS = ("dtype", "torch_dtype")
"""Of config.json, newer and older."""


def store_as(checkpoints: Collection[Checkpoint], dtype: str) -> None:
    """Have merges of checkpoints stored in a dtype: those tensors that are in the usual one of each checkpoint. What is
    not, in one of them, keeps the dtype that it has there, as DeepSeek's float32 biases do beside bfloat16.

    Args:
        checkpoints: the sources; changed in place, before anything is read.
        dtype: one of NAMES.

    Raises:
        CheckpointError: if one is quantised, and its other tensors are not in that dtype.
    """
    usual = [_usual_dtype(checkpoint) for checkpoint in checkpoints]
    apart = [
        {name: inner.dtype for name, inner in _plain(checkpoint) if inner.is_float and inner.dtype != of_most}
        for checkpoint, of_most in zip(checkpoints, usual, strict=True)
    ]
    merged: dict[str, str] = {}  # not what is copied from one of them, whatever others have
    for checkpoint, found in zip(checkpoints, apart, strict=True):
        merged = {**{name: found[name] for name in found if name in checkpoint.scored}, **merged}
    for checkpoint, of_most, found in zip(checkpoints, usual, apart, strict=True):
        plain, own = dict(_plain(checkpoint)), {**found, **merged}
        if of_most != NAMES[dtype] and (odd := [e for name, e in checkpoint.entries.items() if name not in plain]):
            raise CheckpointError(
                f"{checkpoint.path}: {odd[0].name} is stored as {odd[0].encoding}, and a merge as "
                f"{odd[0].encoding.output}: expected no dtype, or that of its other tensors ({of_most}), got {dtype}"
            )
        for name, inner in plain.items():
            if inner.is_float and inner.dtype != (wanted := own.get(name, NAMES[dtype])):
                entry, converted = checkpoint.entries[name], replace(inner, to=wanted)
                encoding = LowRank(converted) if isinstance(entry.encoding, LowRank) else converted
                checkpoint.entries[name] = replace(entry, encoding=encoding)


def _plain(checkpoint: Checkpoint) -> Iterator[tuple[str, Plain]]:
    """Tensors that are not quantised; of one with a low-rank difference, what is stored of the tensor."""
    for name, entry in checkpoint.entries.items():
        inner = entry.encoding.inner if isinstance(entry.encoding, LowRank) else entry.encoding
        if isinstance(inner, Plain):
            yield name, inner


def _usual_dtype(checkpoint: Checkpoint) -> str | None:
    """The dtype of most numbers that generate text, as safetensors writes it; None if all are quantised. Tensors are no
    measure: norms and biases may be more than weights, and a tower for images more than both.
    """
    found: Counter[str] = Counter()
    for name, inner in _plain(checkpoint):
        if name in checkpoint.scored:
            found[inner.dtype] += math.prod(checkpoint.entries[name].shape)
    return found.most_common(1)[0][0] if found else None


def config_in(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json that says so: at its top, and in those of its sections that say any.

    Args:
        config: of the parent.
        dtype: one of NAMES.
    """
    said = _section_in(config, dtype)
    return said if any(said.get(key) for key in _KEYS) else {**said, "dtype": dtype}


def _section_in(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    said = {key: _section_in(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    return said | {key: dtype for key in _KEYS if str(said.get(key)).removeprefix("torch.") in (*NAMES, "float64")}
