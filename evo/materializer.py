"""From a recipe to tensors: into a resident model's slots, or streamed to an export. One code path.

Every part is computed from its sources in float32, rounded once to its stored dtype, and copied in place,
never added to what is resident: after a thousand candidates that would have drifted. So the scored model
is the exported model, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evo.adapter import open_checkpoints
from evo.checkpoint import Checkpoint, CheckpointError
from evo.copies import tied_heads, unscored_copies
from evo.encodings import Stored, Watcher, stack
from evo.encodings.rounding import Rounding
from evo.merge import Method, Stats, get_method
from evo.merge.blocks import Block, Operand
from evo.merge.noise import Key, stream_key, uniforms
from evo.vocabulary import common_rows
from search_spaces.layout import Layout, Part
from search_spaces.recipe import Recipe, Rule

CHUNK_ELEMENTS = 1 << 18
"""Parts are merged in blocks of this size: float32 temporaries take 1 MiB each, and stay in the cache."""

_Key = tuple[Any, ...]


@dataclass(frozen=True)
class UpdateReport:
    """What one write into a resident model did."""

    n_written: int
    n_skipped: int
    """Parts whose inputs had not changed since the last write."""
    written_bytes: int
    seconds: float


@dataclass(frozen=True)
class _Job:
    """A rule made ready to run, the same for every part that it selects; without a method, a copy."""

    sources: tuple[str, ...]
    """The base, then the donors."""
    interface: str
    """Whose rows are taken where vocabularies differ."""
    method: Method | None = None
    coefficients: tuple[float, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    key: _Key = ()
    """All that a part depends on besides its sources' bits, which never change while they are open."""

    @classmethod
    def copy(cls, source: str, interface: str) -> _Job:
        """The stored bits of a source."""
        return cls((source,), interface, key=(interface, source))

    @classmethod
    def of(cls, recipe: Recipe, rule: Rule) -> _Job:
        """A rule's job.

        Raises:
            ValueError: if its method or a knob is unknown, or a knob is out of range.
        """
        method, donors = get_method(rule.method), tuple(rule.coefficients)
        coefficients, sources = tuple(rule.coefficients.values()), (recipe.base, *donors)
        try:
            arguments = method.arguments(rule.knobs, donors)
        except ValueError as error:
            raise ValueError(f"{rule.method}: {error}") from None
        if (copied := method.copy_of(coefficients, **arguments)) is not None:
            return cls.copy(sources[copied], recipe.interface)
        seed = recipe.seed if method.random else 0
        key = (recipe.interface, rule.method, *sources, *coefficients, *arguments.values(), seed)
        return cls(sources, recipe.interface, method, coefficients, arguments, seed, key)


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
        self._tied = tied_heads(first)
        self._common = common_rows(checkpoints)
        if slots is not None and (homeless := [n for n in first.scored if n not in slots]):
            raise CheckpointError(
                f"{len(homeless)} tensor(s) of the checkpoint have no place in the resident model: "
                + ", ".join(homeless[:5])
            )
        self._device = torch.device(device)
        self._resident: dict[tuple[Path, str], Tensor] = {}  # (folder, name in its files) -> bits, on the device
        self._written: dict[Part, _Key] = {}
        self._stats: dict[_Key, Stats] = {}

    @classmethod
    def hosted(cls, slots: Mapping[str, Tensor], sources: Mapping[str, str]) -> Materializer:
        """The constructor an engine calls where its weights live: sources are name -> folder."""
        return cls(open_checkpoints(sources), slots)

    @torch.no_grad()
    def write(self, recipe: Mapping[str, Any]) -> UpdateReport:
        """Write a recipe (as plain data) into the slots; parts whose inputs did not change are skipped."""
        start = time.perf_counter()
        n_written = n_skipped = written_bytes = 0
        for part, job in self._assign(Recipe.from_dict(recipe)).items():
            if part.tensor in self._tied:
                continue
            slot = self._slots[part.tensor]
            if self._written.get(part) == job.key:
                n_skipped += 1
                continue
            self._written.pop(part, None)  # if the copy fails half-way, the part is written again
            target = slot if part.row is None else slot[part.row]
            merged = self._part(part, job, slot.device, keep=True)
            merged.encoding.decode(merged.pieces, target, CHUNK_ELEMENTS)
            self._written[part] = job.key
            n_written += 1
            written_bytes += target.numel() * target.element_size()
        return UpdateReport(n_written, n_skipped, written_bytes, time.perf_counter() - start)

    @torch.no_grad()
    def stream(self, recipe: Recipe, rounding: Rounding | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the merged checkpoint's files on the CPU, as it is stored, one at a time.

        They are those of the interface parent, in its order. Unscored tensors are copied from it; those that
        have the bits of its embedding or head get the bits of the merged one.

        Args:
            recipe: what to build.
            rounding: told what quantising cost.
        """
        interface, jobs = self._checkpoints[recipe.interface], self._assign(recipe)
        parts: dict[str, list[Part]] = {}
        for part in self.layout.parts:
            parts.setdefault(part.tensor, []).append(part)
        same_as = {**self._tied, **unscored_copies(interface)}
        for name in interface.entries:
            original = same_as.get(name, name)
            watch = rounding.watcher(name) if rounding else None
            if original not in parts:
                merged = interface.stored(name).as_output(CHUNK_ELEMENTS)
            else:
                rows = [self._part(p, jobs[p], self._device, False, watch).to("cpu") for p in parts[original]]
                merged = rows[0] if parts[original][0].row is None else stack(rows)
            for suffix, piece in zip(merged.encoding.suffixes, merged.pieces, strict=True):
                yield name + suffix, piece

    def _assign(self, recipe: Recipe) -> dict[Part, _Job]:
        """Part -> job."""
        jobs = {id(rule): _Job.of(recipe, rule) for rule in recipe.rules}
        copy = _Job.copy(recipe.base, recipe.interface)
        return {part: copy if rule is None else jobs[id(rule)] for part, rule in recipe.assign(self.layout).items()}

    def _part(self, part: Part, job: _Job, device: torch.device, keep: bool, watch: Watcher | None = None) -> Stored:
        """One part as it is stored: the same function for a slot and for an export."""
        stored = [self._stored(name, part, device, keep) for name in job.sources]
        if (rows := self._common.get(part.tensor)) is None:
            return self._merged(part, job, stored, device, watch)
        merged = self._merged(part, job, [rows.cut(source) for source in stored], device, watch)
        return rows.complete(merged, self._stored(job.interface, part, device, keep))

    def _merged(
        self, part: Part, job: _Job, stored: list[Stored], device: torch.device, watch: Watcher | None
    ) -> Stored:
        """What a job makes of its sources."""
        if job.method is None:
            return stored[0].as_output(CHUNK_ELEMENTS)
        method = job.method
        base, *donors = (source.operand for source in stored)
        stats = self._measure(part, job, base, donors)
        if method.copy_once_measured:
            copied = method.copy_once_measured(job.coefficients, stats=stats, **job.arguments)
            if copied is not None:
                return stored[copied].as_output(CHUNK_ELEMENTS)
        keys = self._noise_keys(part, job)

        def values(block: Block) -> Tensor:
            arguments = dict(job.arguments)
            if stats is not None:
                arguments["stats"] = [s.at(block[0]) for s in stats] if isinstance(stats, list) else stats.at(block[0])
            if method.random:
                arguments["noise"] = [_noise(key, base, block) for key in keys]
            floats = [donor[block].float() for donor in donors]
            return method.merge(floats, base[block].float(), job.coefficients, **arguments)

        output = stored[0].encoding.output
        return Stored(output, output.encode(stored[0].shape, device, values, CHUNK_ELEMENTS, watch))

    def _measure(self, part: Part, job: _Job, base: Operand, donors: list[Operand]) -> Any:
        """What the job's method wants to know of the whole part; measured once, then remembered."""
        assert job.method is not None
        measure = job.method.measure
        if measure is None:
            return None
        arguments = {name: job.arguments[name] for name in measure.knobs}

        def stats(names: tuple[str, ...], tensors: list[Operand], knobs: Mapping[str, float]) -> Stats:
            key = (measure.function, part, base.device, job.sources[0], names, measure.key(**knobs))
            if key not in self._stats:
                self._stats[key] = measure.function(tensors, base, **knobs)
            return self._stats[key]

        if not measure.per_donor:
            return stats(job.sources[1:], donors, arguments)
        return [
            stats((name,), [donors[d]], {knob: values[d] for knob, values in arguments.items()})
            for d, name in enumerate(job.sources[1:])
        ]

    def _noise_keys(self, part: Part, job: _Job) -> list[Key]:
        """A stream of random numbers for each donor."""
        return [stream_key(job.seed, donor, part.tensor, part.row) for donor in job.sources[1:]]

    def _stored(self, source: str, part: Part, device: torch.device, keep: bool) -> Stored:
        checkpoint = self._checkpoints[source]
        pieces = [self._piece(*held, device, keep) for held in checkpoint.holders(part.tensor)]
        return Stored(checkpoint.entries[part.tensor].encoding, tuple(pieces)).row(part.row)

    def _piece(self, holder: Checkpoint, name: str, device: torch.device, keep: bool) -> Tensor:
        piece = self._resident.get((holder.path, name))
        if piece is None:
            piece = holder.tensor(name).to(device)
            if keep:
                self._resident[holder.path, name] = piece
        return piece


def _noise(key: Key, matrix: Operand, block: Block) -> Tensor:
    """Uniform numbers for a block, numbered by the elements of the matrix."""
    rows, columns = block
    n_rows, n_columns = rows.stop - rows.start, columns.stop - columns.start
    start = rows.start * matrix.shape[1] + columns.start
    return uniforms(key, start, n_rows * n_columns, matrix.device).view(n_rows, n_columns)
