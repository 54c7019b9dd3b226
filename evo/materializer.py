"""From a recipe to tensors: into a resident model's slots, or streamed to an export. One code path.

Every part is computed from its sources in float32, rounded once to its stored dtype, and copied in place,
never added to what is resident: after a thousand candidates that would have drifted. So the scored model
is the exported model, bit for bit. Of several processes each may hold shards (evo.shards): what is not measured of
whole parts is read and merged for these only, and their union is the same model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evo.adapter import open_checkpoints
from evo.checkpoint import Checkpoint, CheckpointError
from evo.copies import tied_heads, unscored_copies
from evo.deltas import EXACT, Deltas, parse
from evo.encodings import EncodingError, Stored, stack
from evo.encodings.rounding import Rounding
from evo.holdings import holdings, kept_bytes, matrix_of
from evo.job import Job
from evo.merge.blocks import Region
from evo.merge.kernels import Fused
from evo.merging import CHUNK_ELEMENTS, Merger, as_output
from evo.reading import Reader, Wanted
from evo.residency import Pieces, Residency, choose
from evo.shards import Slots, Target, targets_of
from evo.vocabulary import common_rows
from search_spaces.layout import Layout, Part
from search_spaces.recipe import Recipe

_Key = tuple[Any, ...]


@dataclass(frozen=True)
class UpdateReport:
    """What one write into a resident model did."""

    n_written: int
    n_skipped: int
    """Parts whose inputs had not changed since the last write."""
    n_compiled: int
    """Parts, or shards of them, that a compiled loop has merged; the others were copied, or merged on tensors."""
    written_bytes: int
    seconds: float
    delta_errors: Mapping[str, float] = field(default_factory=dict)
    """Source -> relative error of its compressed differences; empty where none were used."""


class Materializer:
    """Builds merged tensors from checkpoints that stay open.

    Args:
        checkpoints: source name -> checkpoint; all of one layout.
        slots: tensor name -> resident tensor to write into (any float dtype, any device); several names
            may share one slot (tied weights). Of a partial model also shards. Not needed for streaming.
        device: where merging happens when streaming; writes happen where the slot lives.
        partial: whether the slots are one process's part of a model; what has none is not written here.
        residency: where what is merged into slots lives between candidates.
        deltas: how donors are compressed where a candidate asks for it: "exact", or see evo.deltas. Then donors
            themselves are read from disk when they are needed.
        base: name of the source that compressed differences are taken to.

    Raises:
        CheckpointError: if a tensor has no slot, or a shard does not fit, or cannot be compressed so.
        ValueError: if a residency needs a GPU, and there is none.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, Checkpoint],
        slots: Slots | None = None,
        device: torch.device | str = "cpu",
        *,
        partial: bool = False,
        residency: Residency = Residency.AUTO,
        deltas: str = EXACT,
        base: str | None = None,
    ) -> None:
        self._checkpoints = checkpoints
        first = next(iter(checkpoints.values()))
        self.layout: Layout = first.layout
        self._tied = tied_heads(first)
        self._common = common_rows(checkpoints)
        if slots is not None and not partial:
            _check_complete(slots, first)
        self._targets = self._find_targets(slots or {})
        self._device = torch.device(device)
        self._homes = {t.slot.device: None for targets in self._targets.values() for t in targets}
        home = next(iter(self._homes), self._device)
        compression = parse(deltas)
        self._base = base if compression else None
        self._deltas = Deltas(compression) if compression else None
        if self._deltas:
            self._check_differences(self._deltas)
        chosen = choose(residency, home, *self._n_bytes(), shards=partial)
        if self._deltas:
            self._deltas.on_device = chosen is Residency.DEVICE
        self._pieces = Pieces(chosen)
        kept = checkpoints if self._base is None else (self._base,)  # not donors whose differences are kept
        self._reader = Reader(checkpoints, self._pieces, self._common, kept)
        self._written: dict[Part, _Key] = {}
        self._merger = Merger(first, self._reader, self._common, self._deltas)

    @classmethod
    def hosted(
        cls,
        slots: Slots | None,
        sources: Mapping[str, str],
        device: torch.device | str = "cpu",
        *,
        partial: bool = False,
        residency: str = "auto",
        deltas: str = EXACT,
        base: str | None = None,
    ) -> Materializer:
        """The constructor an engine calls where its weights live: sources are name -> folder."""
        opened, chosen = open_checkpoints(sources), Residency(residency)
        return cls(opened, slots, device, partial=partial, residency=chosen, deltas=deltas, base=base)

    @torch.no_grad()
    def write(self, recipe: Mapping[str, Any]) -> UpdateReport:
        """Write a recipe (as plain data) into the slots; parts whose inputs did not change are skipped.

        Args:
            recipe: of Recipe.to_dict(); a further key "compressed" says whether donors may be compressed.
        """
        start = time.perf_counter()
        written_bytes, n_compiled = 0, self._merger.n_compiled
        compressed = self._may_compress(recipe)
        assigned = self._assign(_recipe_in(recipe), compressed)
        jobs = [(part, job) for part, job in assigned.items() if part in self._targets]
        changed = [(part, job) for part, job in jobs if self._written.get(part) != job.key]
        for i, (part, job) in enumerate(changed):
            self._reader.prefetch(self._wanted(changed[i + 1 : i + 2]))
            self._written.pop(part, None)  # if the copy fails half-way, the part is written again
            for target in self._targets[part]:
                self._write(part, job, target.slot, target.region)
                written_bytes += target.slot.numel() * target.slot.element_size()
            self._written[part] = job.key
        self._reader.prefetch(())  # lets go of the last part's copies
        _wait_for(self._homes)
        n_compiled = self._merger.n_compiled - n_compiled
        n_skipped, seconds = len(jobs) - len(changed), time.perf_counter() - start
        errors = self._deltas.errors if self._deltas and compressed else {}
        return UpdateReport(len(changed), n_skipped, n_compiled, written_bytes, seconds, errors)

    def _may_compress(self, recipe: Mapping[str, Any]) -> bool:
        """Whether a recipe's donors may be, and are, compressed."""
        return self._deltas is not None and bool(recipe.get("compressed")) and recipe["base"] == self._base

    def _n_bytes(self) -> tuple[int, int]:
        """Of all that is kept of the sources, and of it in pinned memory; of shards roughly, as their share of what
        they are cut out of.
        """
        found = holdings(self._checkpoints, self._targets, self._deltas, self._base, self._common).values()
        first = next(iter(self._checkpoints.values()))
        numbers = sum(target.slot.numel() for targets in self._targets.values() for target in targets)
        share = min(1.0, numbers / max(1, sum(math.prod(matrix_of(first, part)) for part in self._targets)))
        kept, pinned = kept_bytes(found)
        return int(kept * share), int(pinned * share)

    @property
    def copied(self) -> Mapping[Part, str]:
        """Parts that were copied once they had been measured -> whose bits they have."""
        return self._merger.copied

    @torch.no_grad()
    def feed(self, recipe: Mapping[str, Any], load: Callable[[Iterator[tuple[str, Tensor]]], object]) -> UpdateReport:
        """Hand the tensors of the merged checkpoint, one at a time, to an engine that has no slots and loads by itself.

        Raises:
            CheckpointError: if a merge is stored in another way than the checkpoint that the engine was started with.
        """
        start, n_compiled, bytes_of = time.perf_counter(), self._merger.n_compiled, list[int]()
        wanted = _recipe_in(recipe)
        entries = self._checkpoints[wanted.interface].scored.values()
        if changed := [entry.name for entry in entries if entry.encoding.output != entry.encoding]:
            raise CheckpointError(
                f"merges of {len(changed)} tensor(s) are stored in another way than the parents' ({changed[0]}, ...), "
                "which an engine that loads weights by itself does not expect: take the engine 'transformers'"
            )

        def counted() -> Iterator[tuple[str, Tensor]]:
            jobs = self._assign(wanted, self._may_compress(recipe))
            keep = self._device.type == "cpu"
            made = self._stretches(wanted, jobs, self._device, keep=keep, forget=False)
            for name, tensor in self._joined(wanted, made):
                bytes_of.append(tensor.nbytes)
                yield name, tensor

        load(counted())
        _wait_for({self._device})
        n_compiled, seconds = self._merger.n_compiled - n_compiled, time.perf_counter() - start
        return UpdateReport(len(bytes_of), 0, n_compiled, sum(bytes_of), seconds)

    def _find_targets(self, slots: Slots) -> dict[Part, list[Target]]:
        """Part -> where it is written, for those that are held here."""
        parts = [part for part in self.layout.parts if part.tensor in slots and part.tensor not in self._tied]
        entries = {part: [c.entries[part.tensor] for c in self._checkpoints.values()] for part in parts}
        return {part: found for part in parts if (found := targets_of(part, entries[part], slots))}

    def _check_differences(self, deltas: Deltas) -> None:
        """Raise CheckpointError unless the differences of all shards can be compressed by themselves."""
        first = next(iter(self._checkpoints.values()))
        for part, targets in self._targets.items():
            for region in (t.region for t in targets if t.region and part.tensor not in self._common):
                try:
                    deltas.check(matrix_of(first, part), region)
                except EncodingError as error:
                    raise CheckpointError(f"memory.deltas: {part.tensor}: {error}") from None

    def _write(self, part: Part, job: Job, slot: Tensor, region: Region | None) -> None:
        made = self._merger.part(part, job, slot.device, True, region=region)
        if isinstance(made, Fused):
            made.into(slot)
        else:
            made.encoding.decode(made.pieces, slot, CHUNK_ELEMENTS)

    def stream(self, recipe: Recipe, rounding: Rounding | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of `stretches`, each whole and in its shape."""
        yield from self._joined(recipe, self.stretches(recipe, rounding))

    def _joined(
        self, recipe: Recipe, tensors: Iterable[tuple[str, Iterable[Tensor | Fused]]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Tensors in one piece and their shape."""
        headers = self._checkpoints[recipe.interface].written_headers()
        for name, stretches in tensors:
            flat = [made.reshape(-1) if isinstance(made, Tensor) else made.result() for made in stretches]
            yield name, (flat[0] if len(flat) == 1 else torch.cat(flat)).view(headers[name].shape)

    @torch.no_grad()
    def stretches(
        self, recipe: Recipe, rounding: Rounding | None = None
    ) -> Iterator[tuple[str, Iterable[Tensor | Fused]]]:
        """Build every tensor of the merged checkpoint's files on the CPU, as it is stored, one at a time.

        They are those of the interface parent, in its order. Unscored tensors are copied from it; those that
        have the bits of its embedding or head get the bits of the merged one.

        Args:
            recipe: what to build.
            rounding: told what quantising cost.

        Yields:
            name, and the tensor in stretches of consecutive elements, to be used up before the next: tensors, or
            compiled loops that make them.
        """
        yield from self._stretches(recipe, self._assign(recipe), torch.device("cpu"), rounding)

    def _stretches(
        self,
        recipe: Recipe,
        jobs: Mapping[Part, Job],
        target: torch.device,
        rounding: Rounding | None = None,
        *,
        keep: bool = False,
        forget: bool = True,
    ) -> Iterator[tuple[str, Iterable[Tensor | Fused]]]:
        """What `stretches` yields, with the merged ones on some device.

        For the next candidate, `keep` lets what is read stay, and `forget` nothing of what has been measured.
        """
        interface = self._checkpoints[recipe.interface]
        parts: dict[str, list[Part]] = {}
        for part in self.layout.parts:
            parts.setdefault(part.tensor, []).append(part)
        same_as = {**self._tied, **unscored_copies(interface)}
        for name, entry in interface.entries.items():
            of, suffixes = parts.get(same_as.get(name, name), []), entry.encoding.output.suffixes
            watch = rounding.watcher(name) if rounding else None
            made = (self._merger.part(part, jobs[part], self._device, keep, watch) for part in of)
            if not of:
                yield from _named(name, as_output(interface.stored(name), name))
            elif len(suffixes) == 1:
                yield name, (one if isinstance(one, Fused) else one.pieces[0].to(target) for one in made)
            else:
                rows = [one.to(target) for one in made if isinstance(one, Stored)]
                yield from _named(name, rows[0] if of[0].row is None else stack(rows))
            if forget:
                self._merger.measured.forget()  # measured for this tensor alone

    def _assign(self, recipe: Recipe, compressed: bool = False) -> dict[Part, Job]:
        """Part -> job."""
        jobs = {id(rule): Job.of(recipe, rule, compressed) for rule in recipe.rules}
        copy = Job.copy(recipe.base, recipe.interface)
        return {part: copy if rule is None else jobs[id(rule)] for part, rule in recipe.assign(self.layout).items()}

    def _wanted(self, jobs: Sequence[tuple[Part, Job]]) -> Iterator[Wanted]:
        """What is read for some jobs."""
        for part, job in jobs:
            interface = (job.interface,) if part.tensor in self._common else ()
            for target in self._targets[part]:
                for source in dict.fromkeys((*job.sources, *interface)):
                    yield source, part, target.slot.device, target.region


def _wait_for(devices: Iterable[torch.device]) -> None:
    """Until a merge is done: a GPU does later what it is asked, and what fails there is told then."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _named(name: str, stored: Stored) -> Iterator[tuple[str, list[Tensor | Fused]]]:
    """The tensors of a file that it is stored as."""
    for suffix, piece in zip(stored.encoding.suffixes, stored.pieces, strict=True):
        yield name + suffix, [piece]


def _recipe_in(asked: Mapping[str, Any]) -> Recipe:
    """The recipe of what `write` is asked for."""
    return Recipe.from_dict({key: value for key, value in asked.items() if key != "compressed"})


def _check_complete(slots: Slots, checkpoint: Checkpoint) -> None:
    if homeless := [name for name in checkpoint.scored if not isinstance(slots.get(name), Tensor)]:
        raise CheckpointError(
            f"{len(homeless)} tensor(s) of the checkpoint have no place in the resident model: "
            + ", ".join(homeless[:5])
            + ". Expected the names that transformers gives them (load and save the checkpoint once) or, where several "
            "processes hold a model together, partial=True."
        )
