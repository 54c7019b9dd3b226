"""A key-value cache whose rows come and go: what continuous batching needs of a cache.

All rows write into the same column at each step, so that a step is one slice assignment. A row that joins
late has its prompt end at the current column and starts further right; a mask hides what lies left of it.
Positions are per row and were applied before keys are cached (rotary embeddings), so where a row sits does
not matter. Sliding-window layers are kept in full: their window is a band of the mask.

Shapes: B rows, H heads, C columns, D head size. Knows nothing of tokens.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

SPARE_COLUMNS = 32
"""Least room to the right after columns were moved; the room is half of what is in use, where that is more."""


KeysAndValues = list[tuple[Tensor, Tensor]]
"""Of n tokens of one row, by layer: keys and values, (H, n, D) each."""


class Columns(Cache):  # type: ignore[misc]  # transformers has no types
    """Rows 0..n_rows-1 are in use, and of each the columns up to `end`.

    All layers' buffers are made before a forward pass: between its temporaries they would leave holes in the heap.

    Args:
        capacity: largest number of rows.
        like: keys and values of any tokens of a row, by layer.
    """

    def __init__(self, capacity: int, like: KeysAndValues) -> None:
        self.capacity = capacity
        self.n_rows = self.first = self.end = 0
        self.rows = slice(0, 0)
        """Rows that the coming forward pass is about."""
        self.past = 0
        """Columns that the coming forward pass sees besides those it adds."""
        # Were layers to own what owns them, their gigabytes would stay until Python looks for cycles.
        weak: Any = weakref.proxy(self)
        super().__init__(layers=[_Layer(weak, keys, values) for keys, values in like])

    def join(self, n_rows: int, width: int) -> None:
        """Make ready for a forward pass over the prompts of new rows, left-padded to `width` columns."""
        self._widen(width)
        self.rows, self.past = slice(self.n_rows, self.n_rows + n_rows), 0
        self.n_rows += n_rows

    def copied(self, row: int, n: int) -> KeysAndValues:
        """A copy of the latest n tokens of a row."""
        used = slice(self.end - n, self.end)
        return [(layer.keys[row, :, used].clone(), layer.values[row, :, used].clone()) for layer in self.layers]

    def join_again(self, rows: Sequence[KeysAndValues]) -> None:
        """Add rows that were copied out of this cache."""
        lengths = [row[0][0].shape[1] for row in rows]
        self._widen(max(lengths))
        for place, (row, n) in enumerate(zip(rows, lengths, strict=True), self.n_rows):
            for layer, (keys, values) in zip(self.layers, row, strict=True):
                layer.keys[place, :, self.end - n : self.end] = keys
                layer.values[place, :, self.end - n : self.end] = values
        self.n_rows += len(rows)

    def step(self, longest: int) -> None:
        """Make ready for a forward pass over one more token of every row.

        Args:
            longest: tokens that are cached of the longest row; columns further left are of no use.
        """
        self.first = self.end - longest
        if self.end == self.layers[0].keys.shape[2]:
            self._move(longest, to=longest)
        self.rows, self.past = slice(0, self.n_rows), longest
        self.end += 1

    def drop(self, rows: list[int]) -> list[int]:
        """Forget rows; the last ones move into the holes. Returns the old numbers of the rows that are left."""
        gone, n_left = set(rows), self.n_rows - len(rows)
        holes = sorted(row for row in rows if row < n_left)
        moved = [row for row in range(n_left, self.n_rows) if row not in gone]
        order = list(range(n_left))
        for hole, row in zip(holes, moved, strict=True):
            order[hole] = row
        used = slice(self.first, self.end)
        for layer in self.layers if holes else ():
            for buffer in (layer.keys, layer.values):
                buffer[holes, :, used] = buffer[moved, :, used]
        self.n_rows = n_left
        return order

    def _widen(self, width: int) -> None:
        """Have room for rows of so many columns that end at the current one."""
        if self.end < width:
            self._move(self.end - self.first, to=width)
        self.first = min(self.first, self.end - width)

    def _move(self, n_used: int, to: int) -> None:
        """Copy the used columns into new buffers, where they end at column `to`."""
        spare = max(SPARE_COLUMNS, n_used // 2)
        for layer in self.layers:
            layer.keys = self._moved(layer.keys, n_used, to, spare)
            layer.values = self._moved(layer.values, n_used, to, spare)
        self.first, self.end = to - n_used, to

    def _moved(self, old: Tensor, n_used: int, to: int, spare: int) -> Tensor:
        # Zeros, not rubbish: a masked column counts as 0 times its value, and 0 times NaN is NaN.
        new = old.new_zeros(old.shape[0], old.shape[1], to + spare, old.shape[3])
        new[: self.n_rows, :, to - n_used : to] = old[: self.n_rows, :, self.end - n_used : self.end]
        return new


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer: (capacity, H, C, D) each."""

    def __init__(self, cache: Columns, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self._cache = cache
        self.keys, self.values = (t.new_zeros(cache.capacity, t.shape[0], 0, t.shape[2]) for t in (keys, values))
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """See CacheLayerMixin: nothing is left to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new columns; return them with those before them."""
        rows, end, n_new = self._cache.rows, self._cache.end, key_states.shape[2]
        self.keys[rows, :, end - n_new : end] = key_states
        self.values[rows, :, end - n_new : end] = value_states
        first = end - n_new - self._cache.past
        return self.keys[rows, :, first:end], self.values[rows, :, first:end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See CacheLayerMixin."""
        return self._cache.past + query_length, 0

    def get_seq_length(self) -> int:
        """See CacheLayerMixin."""
        return self._cache.past

    def get_max_length(self) -> int:
        """See CacheLayerMixin."""
        return -1


def is_columnar(config: PretrainedConfig) -> bool:
    """Whether every layer of a model keeps plain keys and values, which is all that Columns can hold."""
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers)


@torch.inference_mode()
def check_cache(model: Any) -> None:
    """Try whether a model takes a cache that is made as ours are, and tells how long it is.

    Raises:
        ValueError: if it does not.
    """
    cache = DynamicCache(config=model.config)
    try:
        _read_one(model, cache)
        cache.get_seq_length()
    except ValueError as error:
        raise ValueError(
            f"the engine 'transformers' cannot decode model_type {model.config.model_type!r}, which remembers text in "
            f"a way of its own ({error}). Merges need no engine; for a search, the engine 'vllm' may know it"
        ) from error


def one_token(model: Any) -> KeysAndValues:
    """Keys and values of a token of a model whose layers keep no more, found by a forward pass."""
    cache = DynamicCache(config=model.config)
    _read_one(model, cache)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


@dataclass(frozen=True)
class RowMemory:
    """Bytes of what a model remembers of one row of text."""

    layers: tuple[tuple[int, int | None], ...]
    """Of each layer that has any: bytes of a token's keys and values, and how many tokens' it keeps (None: all)."""
    state: int = 0
    """However long the row is: what recurrent layers and convolutions keep."""

    @property
    def token(self) -> int:
        """Of a token's keys and values in all layers."""
        return sum(n_bytes for n_bytes, _ in self.layers)

    def n_bytes(self, n_tokens: int) -> int:
        """Of a row of so many tokens."""
        kept = (n_bytes * min(n_tokens, n_tokens if most is None else most) for n_bytes, most in self.layers)
        return self.state + sum(kept)


def row_memory(model: Any) -> RowMemory:
    """What a model remembers of a row, found by a forward pass over one token."""
    cache = DynamicCache(config=model.config)
    _read_one(model, cache)
    columnar, layers, state = is_columnar(model.config), [], 0
    for layer in cache.layers:
        held = {name: value for name, value in vars(layer).items() if isinstance(value, Tensor | dict)}
        both = [t for name in ("keys", "values") if isinstance(t := held.pop(name, None), Tensor)]
        if n_bytes := sum(t.nbytes // t.shape[-2] for t in both):
            layers.append((n_bytes, None if columnar else getattr(layer, "sliding_window", None)))
        others = (v for value in held.values() for v in (value.values() if isinstance(value, dict) else [value]))
        state += sum(t.nbytes for t in others if isinstance(t, Tensor))
    return RowMemory(tuple(layers), 0 if columnar else state)


@torch.inference_mode()
def _read_one(model: Any, cache: DynamicCache) -> None:
    """Have a model put what it remembers of one token into a cache."""
    one = torch.ones(1, 1, dtype=torch.long, device=model.device)
    model(input_ids=one, **{cache_name(model): cache}, use_cache=True, logits_to_keep=1)


def cache_name(model: Any) -> str:
    """What the argument is called that takes a cache: transformers renamed it after 5.19."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
