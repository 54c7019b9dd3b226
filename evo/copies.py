"""Tensors of a checkpoint that hold the same as another one, and must go on doing so in a child."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from evo.checkpoint import Checkpoint
from search_spaces.layout import Role

_copies: WeakKeyDictionary[Checkpoint, dict[str, str]] = WeakKeyDictionary()


def tied_heads(checkpoint: Checkpoint) -> dict[str, str]:
    """Head -> embedding, where a checkpoint ties the two and yet stores both."""
    if not checkpoint.is_tied:
        return {}
    names = list(checkpoint.scored)
    heads = [name for name in names if name.endswith("lm_head.weight")]
    embeddings = [name for name in names if name.endswith("embed_tokens.weight")]
    return {heads[0]: embeddings[0]} if heads and embeddings else {}


def unscored_copies(checkpoint: Checkpoint) -> dict[str, str]:
    """Unscored tensor -> the embedding or head whose bits it has, as in DeepSeek's multi-token prediction.

    Reads the candidates, the tensors of the same shape, once.
    """
    if checkpoint not in _copies:
        _copies[checkpoint] = _find_copies(checkpoint)
    return _copies[checkpoint]


def _find_copies(checkpoint: Checkpoint) -> dict[str, str]:
    originals = [p.tensor for p in checkpoint.layout.parts if p.role in (Role.EMBEDDING, Role.HEAD)]
    found: dict[str, str] = {}
    for name in checkpoint.layout.unscored:
        entry = checkpoint.entries[name]
        for original in originals:
            like = checkpoint.entries[original]
            if (like.shape, like.encoding) == (entry.shape, entry.encoding) and _same(checkpoint, name, original):
                found.setdefault(name, original)
    return found


def _same(checkpoint: Checkpoint, name: str, other: str) -> bool:
    pieces = zip(checkpoint.stored(name).pieces, checkpoint.stored(other).pieces, strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pieces)
