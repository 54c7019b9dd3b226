"""Continuous batching: a row that has finished makes room for the next prompt.

`model.generate` computes every row of a batch until the longest has ended. Answers differ in length many
times over (that is what a search here is about), so here finished rows leave at once, and prompts that wait
join as soon as enough rows are free to be worth a forward pass of their own.

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

from fitness.engines.columns import Columns
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
        self._one_more = step or model

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
        waiting = [i for i, request in enumerate(requests) if request.max_tokens > 0]
        batch = _Batch(requests, min(batch_size, len(waiting)), self._model.device)
        cache = Columns(batch.capacity) if self._refill else DynamicCache(config=self._model.config)
        while waiting or batch.n_rows:
            n_free = batch.capacity - batch.n_rows
            if waiting and (n_free >= batch.worth_joining() or not batch.n_rows):
                joining, waiting = waiting[:n_free], waiting[n_free:]
                logits = self._prefill(batch, cache, joining)
                rows = slice(batch.n_rows - len(joining), batch.n_rows)
            else:
                logits, rows = self._step(batch, cache), slice(0, batch.n_rows)
            finished = self._write(batch, logits, rows)
            for row in finished:
                done[batch.index[row]] = batch.end(row)
            if finished and self._refill:
                batch.keep(cache.drop(finished))
            elif finished and batch.finished.all():
                break
        return done

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
        logits: Tensor = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
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


class _Batch:
    """The rows in flight: their tokens on the device, left-aligned; their bookkeeping on the host."""

    def __init__(self, requests: Sequence[Request], capacity: int, device: torch.device) -> None:
        self._requests, self.capacity, self._device = requests, capacity, device
        width = max((len(r.ids) + r.max_tokens for r in requests), default=0)
        self.tokens = torch.zeros(capacity, width, dtype=torch.long, device=device)
        self.index = np.zeros(0, np.int64)  # (B,) which request each row continues
        self.length = np.zeros(0, np.int64)  # (B,) tokens of prompt and continuation
        self.finished = np.zeros(0, np.bool_)  # (B,)
        self._n_ended = self._n_tokens = 0
        self._n_prompt = np.array([len(r.ids) for r in requests], np.int64)
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
        return (self.length - self._n_prompt[self.index])[rows]

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
        self.index = np.append(self.index, np.array(joining, np.int64))
        self.length = np.append(self.length, lengths)
        self.finished = np.append(self.finished, np.zeros(len(prompts), np.bool_))
        return ids.to(self._device), mask.to(self._device)

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

    def end(self, row: int) -> list[int]:
        """The continuation of a row that has ended."""
        n_prompt = self._n_prompt[self.index[row]]
        written: list[int] = self.tokens[row, n_prompt : self.length[row]].tolist()
        self._n_ended, self._n_tokens = self._n_ended + 1, self._n_tokens + len(written)
        return written

    def worth_joining(self) -> int:
        """How many rows should be free before prompts join.

        A pass over prompts costs about a step. With a share f of the rows free before each, a row takes 1/f of
        a pass over prompts and n/(1 - f/2) steps per batch: least at f = sqrt(2/n), n being the mean length.
        """
        mean = self._n_tokens / max(1, self._n_ended)
        return int(min(0.5, (2 / max(1.0, mean)) ** 0.5) * self.capacity) or 1

    def keep(self, order: list[int]) -> None:
        """Take the rows in this order and forget the others."""
        moved = [(new, old) for new, old in enumerate(order) if new != old]
        if moved:
            new, old = (list(rows) for rows in zip(*moved, strict=True))
            self.tokens[new] = self.tokens[old]
        self.index, self.length, self.finished = self.index[order], self.length[order], self.finished[order]
