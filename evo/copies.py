"""Tensors of a checkpoint that hold the same as another one, and must go on doing so in a child."""

from __future__ import annotations

import functools
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch

from evo.checkpoint import Checkpoint, CheckpointError
from search_spaces.layout import Role, is_by_token

_Copies = dict[str, str]


def _once(find: Callable[[Checkpoint], _Copies]) -> Callable[[Checkpoint], _Copies]:
    """Looked for once, as long as the checkpoint lives."""
    known: WeakKeyDictionary[Checkpoint, _Copies] = WeakKeyDictionary()

    @functools.wraps(find)
    def found(checkpoint: Checkpoint) -> _Copies:
        if checkpoint not in known:
            known[checkpoint] = find(checkpoint)
        return known[checkpoint]

    return found


@_once
def tied_heads(checkpoint: Checkpoint) -> _Copies:
    """Head -> embedding, where a checkpoint ties the two and yet stores both.

    Where config.json does not say, what decides is their bits: transformers ties by the default of the architecture
    then, but not tensors that differ.

    Raises:
        CheckpointError: if config.json ties tensors that are stored with different bits: libraries differ in which of
            the two such a model reads.
    """
    by_token = [part for part in checkpoint.layout.parts if is_by_token(part.tensor)]
    head = next((part.tensor for part in by_token if part.role is Role.HEAD), None)
    embedding = next((part.tensor for part in by_token if part.role is Role.EMBEDDING), None)
    if head is None or embedding is None or checkpoint.is_tied is False:
        return {}
    if _are_equal(checkpoint, head, embedding):
        return {head: embedding}
    if checkpoint.is_tied:
        raise CheckpointError(
            f"{checkpoint.path}: config.json says tie_word_embeddings, but {head} is stored, and not with the bits of "
            f"{embedding}: expected false there, or no {head}"
        )
    return {}


@_once
def unscored_copies(checkpoint: Checkpoint) -> _Copies:
    """Unscored tensor -> the embedding or head whose bits it has, as in DeepSeek's multi-token prediction.

    Reads the candidates, the tensors of the same shape, once.
    """
    originals = [p.tensor for p in checkpoint.layout.parts if p.role in (Role.EMBEDDING, Role.HEAD)]
    tied = tied_heads(checkpoint)
    found: dict[str, str] = {}
    for name in checkpoint.layout.unscored:
        for original in originals:
            if _are_equal(checkpoint, name, original):
                found.setdefault(name, tied.get(original, original))  # which is what follows a merge
    return found


def _are_equal(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Whether two tensors are stored alike, in the same bits."""
    entry, like = checkpoint.entries[name], checkpoint.entries[other]
    if (like.shape, like.encoding) != (entry.shape, entry.encoding):
        return False
    pieces = zip(checkpoint.stored(name).pieces, checkpoint.stored(other).pieces, strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pieces)
