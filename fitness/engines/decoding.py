"""Continuous batching: a row that has finished makes room for the next prompt.

`model.generate` computes every row of a batch until the longest has ended. Answers differ in length many
times over (that is what a search here is about), so here finished rows leave at once, and prompts that wait
join as soon as enough rows are free to be worth a forward pass of their own. Rows that have become longer than the
others wait for their like (levels.py).

The text depends on the prompts, their order and the batch size, and on nothing else; in float32, in practice,
on the prompt alone.

Shapes: B rows in the batch, L tokens of the longest. Knows token ids; knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from fitness.engines.columns import Columns, KeysAndValues, cache_name, one_token
from fitness.engines.levels import LEAST_TOKENS, Levels, lowest_level
from fitness.engines.sampling import Sampler


@dataclass(frozen=True)
class Request:
    """A prompt to continue."""

    ids: Sequence[int]
    max_tokens: int
    seed: int = 0


TAIL = 64
"""How many of the latest tokens are searched for a stop string."""


class Decoder:
    """Continues requests with one model.

    Args:
        model: a causal language model of transformers.
        sampler: picks the next tokens.
        stop_ids: tokens that end a row.
        stops: given the latest tokens of rows (B, TAIL), right-aligned and -1 where a continuation is shorter,
            says which rows end with a stop string, (B,) bool. None: there is no such string.
        refill: whether the model's cache can be held in Columns; else batches are decoded one after another.
        step: what computes one more token of every row, if it is not the model itself.
    """

    def __init__(
        self,
        model: Any,
        sampler: Sampler,
        stop_ids: Tensor,
        stops: Callable[[Tensor], Tensor] | None,
        *,
        refill: bool,
        step: Callable[..., Any] | None = None,
    ) -> None:
        self._model, self._sampler, self._stop_ids, self._stops, self._refill = model, sampler, stop_ids, stops, refill
        self._one_more, self._cache_name = step or model, cache_name(model)
        self._like = one_token(model) if refill else []

    @torch.inference_mode()
    def decode(self, requests: Sequence[Request], batch_size: int) -> list[list[int]]:
        """The continuation of each request, in order, the stop token included.

        Longest prompts go first: neighbours need little padding, and what tends to take long does not come last.

        Raises:
            FloatingPointError: if logits are not finite.
        """
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].ids))
        size = max(1, len(requests) if self._refill else batch_size)
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        done = {
            i: ids
            for batch in batches
            for i, ids in zip(batch, self._run([requests[i] for i in batch], batch_size), strict=True)
        }
        return [done[i] for i in range(len(requests))]

    def _run(self, requests: Sequence[Request], batch_size: int) -> list[list[int]]:
        done: list[list[int]] = [[] for _ in requests]
        wanted = [i for i, request in enumerate(requests) if request.max_tokens > 0]
        batch = _Batch([requests[i] for i in wanted], min(batch_size, len(wanted)), self._model.device)
        cache = Columns(batch.capacity, self._like) if self._refill else DynamicCache(config=self._model.config)
        others, parked = self._others(batch), dict[int, _Parked]()
        while others.anyone or batch.n_rows:
            joining = others.join(batch.n_rows)
            if joining.parked:
                again = [parked.pop(i) for i in joining.parked]
                batch.join_again(joining.parked, [row.tokens for row in again])
                cache.join_again([row.cached for row in again])
                del again  # copies of what is in the cache by now
                continue
            if joining.fresh:
                logits = self._prefill(batch, cache, joining.fresh)
                rows = slice(batch.n_rows - len(joining.fresh), batch.n_rows)
            else:
                logits, rows = self._step(batch, cache), slice(0, batch.n_rows)
            leaving = self._write(batch, logits, rows)
            for row in leaving:
                written = done[wanted[batch.index[row]]] = batch.written(row)
                others.end(len(written))
            for row in others.outgrown(batch.length.tolist()):
                if not batch.finished[row]:
                    i, length = int(batch.index[row]), int(batch.length[row])
                    others.park(i, length)
                    parked[i] = _Parked(batch.tokens[row, :length].clone(), cache.copied(row, length - 1))
                    leaving.append(row)
            if leaving and self._refill:
                batch.keep(cache.drop(leaving))
            elif leaving and batch.finished.all():
                break
        return done

    def _others(self, batch: _Batch) -> Levels:
        """All rows, none of which is in the batch yet."""
        lowest = batch.width
        if self._refill and lowest > LEAST_TOKENS:
            token = sum(keys.nbytes + values.nbytes for keys, values in self._like)
            lowest = lowest_level(sum(p.nbytes for p in self._model.parameters()), batch.capacity, token)
        return Levels(batch.n_prompt.tolist(), batch.capacity, batch.width, lowest)

    def _prefill(self, batch: _Batch, cache: Any, joining: list[int]) -> Tensor:
        ids, mask = batch.join(joining)
        if isinstance(cache, Columns):
            cache.join(*ids.shape)
        positions = (mask.cumsum(1) - 1).clamp_(min=0)
        return self._forward(self._model, cache, input_ids=ids, attention_mask=mask, position_ids=positions)

    def _step(self, batch: _Batch, cache: Any) -> Tensor:
        n_cached = batch.length - 1  # the last token of each row is what goes in now
        if isinstance(cache, Columns):
            cache.step(int(n_cached.max()))
        n_past = torch.from_numpy(n_cached).to(self._model.device)[:, None]
        columns = torch.arange(-cache.get_seq_length(), 1, device=self._model.device)  # 0 is the new token's
        mask = (columns >= -n_past).long()
        inputs = {"input_ids": batch.last(), "attention_mask": mask, "position_ids": n_past}
        return self._forward(self._one_more, cache, **inputs)

    def _forward(self, model: Callable[..., Any], cache: Any, **inputs: Tensor) -> Tensor:
        logits: Tensor = model(**inputs, **{self._cache_name: cache}, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1]  # (B, V)

    def _write(self, batch: _Batch, logits: Tensor, rows: slice) -> list[int]:
        """Add a token to some rows; the rows that end with it."""
        history = batch.history(rows) if self._sampler.needs_history else batch.tokens[rows]
        tokens = self._sampler(logits, history, batch.seed[rows], batch.n_written(rows))
        batch.append(rows, tokens)
        ended = torch.isin(tokens, self._stop_ids)
        if self._stops is not None:
            ended |= self._stops(batch.tail(rows))
        # NaN is the largest of all, so it shows in the maximum. One wait for the device in a step.
        ended, finite = torch.stack([ended, torch.isfinite(logits.amax(dim=-1))]).cpu().numpy()
        if not (finite | batch.finished[rows]).all():
            raise FloatingPointError("the model's logits are not finite")
        full = batch.n_written(rows) >= batch.limit[rows]
        new = (ended | full) & ~batch.finished[rows]
        batch.finished[rows] |= new
        return [int(row) + rows.start for row in np.flatnonzero(new)]


@dataclass(frozen=True)
class _Parked:
    """A row that waits for others of its length."""

    tokens: Tensor
    """Of its prompt and continuation."""
    cached: KeysAndValues
    """Of all of them but the last."""


class _Batch:
    """The rows in flight: their tokens on the device, left-aligned; their bookkeeping on the host."""

    def __init__(self, requests: Sequence[Request], capacity: int, device: torch.device) -> None:
        self._requests, self.capacity, self._device = requests, capacity, device
        self.width = max((len(r.ids) + r.max_tokens for r in requests), default=0)
        """Tokens that a row can come to."""
        self.tokens = torch.zeros(capacity, self.width, dtype=torch.long, device=device)
        self.index = np.zeros(0, np.int64)  # (B,) which request each row continues
        self.length = np.zeros(0, np.int64)  # (B,) tokens of prompt and continuation
        self.finished = np.zeros(0, np.bool_)  # (B,)
        self.n_prompt = np.array([len(r.ids) for r in requests], np.int64)
        self._limits = np.array([r.max_tokens for r in requests], np.int64)
        self._seeds = np.array([r.seed for r in requests], np.uint64)

    @property
    def n_rows(self) -> int:
        return len(self.index)

    @property
    def seed(self) -> NDArray[np.uint64]:
        return self._seeds[self.index]

    @property
    def limit(self) -> NDArray[np.int64]:
        return self._limits[self.index]

    def n_written(self, rows: slice) -> NDArray[np.int64]:
        return (self.length - self.n_prompt[self.index])[rows]

    def join(self, joining: list[int]) -> tuple[Tensor, Tensor]:
        """Add rows; their prompts as ids and mask, padded on the left: (n, longest prompt) each."""
        prompts = [self._requests[i].ids for i in joining]
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        width = int(lengths.max())
        ids, mask, filled = (torch.zeros(len(prompts), width, dtype=torch.long) for _ in range(3))
        for row, prompt in enumerate(prompts):
            filled[row, : len(prompt)] = ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        self.tokens[self.n_rows : self.n_rows + len(prompts), :width] = filled.to(self._device)
        self._add(joining, lengths)
        return ids.to(self._device), mask.to(self._device)

    def join_again(self, joining: list[int], tokens: Sequence[Tensor]) -> None:
        """Add rows that were parked, with all that they hold."""
        for row, held in enumerate(tokens, self.n_rows):
            self.tokens[row, : len(held)] = held
        self._add(joining, np.array([len(held) for held in tokens], np.int64))

    def _add(self, joining: list[int], lengths: NDArray[np.int64]) -> None:
        self.index = np.append(self.index, np.array(joining, np.int64))
        self.length = np.append(self.length, lengths)
        self.finished = np.append(self.finished, np.zeros(len(joining), np.bool_))

    def append(self, rows: slice, tokens: Tensor) -> None:
        """Write one token into each of some rows; a row that has finished keeps its end."""
        ends = torch.from_numpy(self.length[rows]).to(self._device)
        live = torch.from_numpy(~self.finished[rows]).to(self._device)
        at = ends.clamp(max=self.tokens.shape[1] - 1)[:, None]
        old = self.tokens[rows].gather(1, at).squeeze(1)
        self.tokens[rows].scatter_(1, at, torch.where(live, tokens, old)[:, None])
        self.length[rows] += ~self.finished[rows]

    def last(self) -> Tensor:
        """The latest token of each row, (B, 1)."""
        at = torch.from_numpy(self.length - 1).to(self._device)[:, None]
        return self.tokens[: self.n_rows].gather(1, at)

    def tail(self, rows: slice) -> Tensor:
        """The latest tokens of some rows, right-aligned: (B, TAIL), -1 where the continuation is shorter."""
        back = torch.arange(-TAIL, 0, device=self._device)
        at = torch.from_numpy(self.length[rows]).to(self._device)[:, None] + back
        first = torch.from_numpy(self.length[rows] - self.n_written(rows)).to(self._device)[:, None]
        return self.tokens[rows].gather(1, at.clamp(min=0)).masked_fill(at < first, -1)

    def history(self, rows: slice) -> Tensor:
        """All tokens of some rows, (B, L); a short row repeats its first token, which adds none to what it holds."""
        longest = int(self.length[rows].max())
        there = torch.arange(longest) < torch.from_numpy(self.length[rows])[:, None]
        tokens = self.tokens[rows, :longest]
        return torch.where(there.to(self._device), tokens, tokens[:, :1])

    def written(self, row: int) -> list[int]:
        """The continuation of a row."""
        found: list[int] = self.tokens[row, self.n_prompt[self.index[row]] : self.length[row]].tolist()
        return found

    def keep(self, order: list[int]) -> None:
        """Take the rows in this order and forget the others."""
        moved = [(new, old) for new, old in enumerate(order) if new != old]
        if moved:
            new, old = (list(rows) for rows in zip(*moved, strict=True))
            self.tokens[new] = self.tokens[old]
        self.index, self.length, self.finished = self.index[order], self.length[order], self.finished[order]
