"""From a recipe to tensors: into a resident model's slots, or streamed to an export. One code path.

Every part is computed from its sources in float32, rounded once to its stored dtype, and copied in place,
never added to what is resident: after a thousand candidates that would have drifted. So the scored model
is the exported model, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evo.checkpoint import Checkpoint, CheckpointError
from evo.merge import get_method
from search_spaces.layout import Layout, Part
from search_spaces.recipe import Recipe, Rule

CHUNK_ELEMENTS = 1 << 20
"""Parts are merged in chunks, so that float32 temporaries take 4 MiB each however large a tensor is."""

_Key = tuple[Any, ...]


@dataclass(frozen=True)
class UpdateReport:
    """What one write into a resident model did."""

    n_written: int
    n_skipped: int
    """Parts whose inputs had not changed since the last write."""
    written_bytes: int
    seconds: float


class Materializer:
    """Builds merged tensors from checkpoints that stay open.

    Args:
        checkpoints: source name -> checkpoint; all of one layout.
        slots: tensor name -> resident tensor to write into (any float dtype, any device); several names
            may share one slot (tied weights). Not needed for streaming.
        device: where merging happens when streaming; writes happen where the slot lives.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        slots: Mapping[str, Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._checkpoints = checkpoints
        self._slots = slots or {}
        first = next(iter(checkpoints.values()))
        self.layout: Layout = first.layout
        self._canonical = _tied_names(first)
        if slots is not None and (homeless := [n for n in first.headers if n not in slots]):
            raise CheckpointError(
                f"{len(homeless)} tensor(s) of the checkpoint have no place in the resident model: "
                + ", ".join(homeless[:5])
            )
        self._device = torch.device(device)
        self._resident: dict[tuple[str, str], Tensor] = {}  # (source, tensor) -> stored bits, on the device
        self._written: dict[Part, _Key] = {}

    @classmethod
    def hosted(cls, slots: Mapping[str, Tensor], sources: Mapping[str, str]) -> Materializer:
        """The constructor an engine calls where its weights live: sources are name -> folder."""
        return cls({name: Checkpoint.open(path) for name, path in sources.items()}, slots)

    @torch.no_grad()
    def write(self, recipe: Mapping[str, Any]) -> UpdateReport:
        """Write a recipe (as plain data) into the slots; parts whose inputs did not change are skipped."""
        start = time.perf_counter()
        n_written = n_skipped = written_bytes = 0
        for part, rule in self._assign(Recipe.from_dict(recipe)).items():
            key, slot = _key(rule), self._slots[part.tensor]
            if self._written.get(part) == key:
                n_skipped += 1
                continue
            self._written.pop(part, None)  # if the copy fails half-way, the part is written again
            target = slot if part.row is None else slot[part.row]
            target.copy_(self._part(part, rule, slot.device, keep=True))
            self._written[part] = key
            n_written += 1
            written_bytes += target.numel() * target.element_size()
        return UpdateReport(n_written, n_skipped, written_bytes, time.perf_counter() - start)

    @torch.no_grad()
    def stream(self, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the merged checkpoint on the CPU, in its stored dtype, one at a time."""
        rows: list[Tensor] = []
        assigned = list(self._assign(recipe, with_ties=True).items())
        for (part, rule), following in zip(assigned, [*assigned[1:], None], strict=True):
            rows.append(self._part(part, rule, self._device, keep=False).cpu())
            if following is None or following[0].tensor != part.tensor:
                yield part.tensor, rows[0] if part.row is None else torch.stack(rows)
                rows = []

    def _assign(self, recipe: Recipe, with_ties: bool = False) -> dict[Part, tuple[str, Rule | None]]:
        """Part -> (base, rule). A tied tensor takes the rule of the tensor it is tied to."""
        rules = recipe.assign(self.layout)
        if not self._canonical:
            return {part: (recipe.base, rule) for part, rule in rules.items()}
        by_name = {part.tensor: rule for part, rule in rules.items()}
        return {
            part: (recipe.base, by_name[self._canonical[part.tensor]] if part.tensor in self._canonical else rule)
            for part, rule in rules.items()
            if with_ties or part.tensor not in self._canonical
        }

    def _part(self, part: Part, assigned: tuple[str, Rule | None], device: torch.device, keep: bool) -> Tensor:
        """One part in its stored dtype: the same function for a slot and for an export."""
        base_name, rule = assigned
        if rule is None:
            return self._stored(base_name, part, device, keep)
        method, coefficients = get_method(rule.method), list(rule.coefficients.values())
        inputs = [base_name, *rule.coefficients]
        if (copied := method.copy_of(coefficients)) is not None:
            return self._stored(inputs[copied], part, device, keep)
        base, *donors = [self._stored(name, part, device, keep) for name in inputs]
        merged = torch.empty_like(base, memory_format=torch.contiguous_format)
        flat_inputs = [torch.split(t.reshape(-1), CHUNK_ELEMENTS) for t in (base, *donors)]
        for out, base_chunk, *chunks in zip(torch.split(merged.view(-1), CHUNK_ELEMENTS), *flat_inputs, strict=True):
            floats = [chunk.float() for chunk in chunks]
            out.copy_(method.merge(floats, base_chunk.float(), coefficients, **rule.knobs))
        return merged

    def _stored(self, source: str, part: Part, device: torch.device, keep: bool) -> Tensor:
        tensor = self._resident.get((source, part.tensor))
        if tensor is None:
            tensor = self._checkpoints[source].tensor(part.tensor).to(device)
            if keep:
                self._resident[source, part.tensor] = tensor
        return tensor if part.row is None else tensor[part.row]


def _tied_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Head -> embedding, where a checkpoint ties the two and yet stores both."""
    if not checkpoint.is_tied:
        return {}
    names = list(checkpoint.headers)
    heads = [name for name in names if name.endswith("lm_head.weight")]
    embeddings = [name for name in names if name.endswith("embed_tokens.weight")]
    return {heads[0]: embeddings[0]} if heads and embeddings else {}


def _key(assigned: tuple[str, Rule | None]) -> _Key:
    """All that a part depends on besides its sources' bits, which never change while they are open."""
    base, rule = assigned
    if rule is None:
        return (base,)
    copied = get_method(rule.method).copy_of(list(rule.coefficients.values()))
    if copied is not None:
        return ([base, *rule.coefficients][copied],)
    return (base, rule.method, *rule.coefficients.items(), *sorted(rule.knobs.items()))
