"""What a search takes of GPU, host and disk, and the setting that makes it fit.

Pure arithmetic over footprint.py: nothing is loaded, and what the machine has is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

from evo.config import Config
from evo.planning.engines import HELD, unknown
from evo.planning.footprint import MIB, export_bytes
from evo.planning.sources import Item, Sources
from evo.planning.times import size
from evo.residency import Residency
from evo.worker import N_SAMPLES

LATER_BYTES = 20 * MIB
"""Of libraries and model code that a search imports and a plan does not (0 to 45 MB were measured)."""
MLFLOW_BYTES = 340 * MIB
"""Of the process that writes to MLflow and draws pictures, as measured."""
LEDGER_BYTES, OUTCOME_BYTES, ANSWER_BYTES, GENE_BYTES = 150_000, 2_000, 9, 4
"""Of the ledger: at first, and for each evaluation, with its answers and genes."""
TOKEN_BYTES = 4
"""Of the text of a token: some answers of each evaluation are kept in full, taken to be half of max_tokens long."""
STORE_BYTES, PICTURE_BYTES = 900_000, 70_000
"""Of MLflow's store at first, and of the picture that it is given after every generation."""


class PlanError(ValueError):
    """A search does not fit the machine; the message names the setting that would help."""


@dataclass(frozen=True)
class Settings:
    """What can be changed to make a search fit."""

    device: str
    """Where the model lives: "gpu", or "host" for a CPU."""
    dtype: str
    """Of the resident model."""
    rows: int
    """Answers decoded together."""
    residency: str = "auto"
    """Of what is merged."""
    deltas: str = "exact"
    """How donors are held."""
    engine: str = "transformers"
    total: int = 0
    """Bytes that the device has, of which vLLM takes a share."""
    share: float | None = None
    """The share that vLLM is to take; None for other engines, or if its cache has a size of its own."""
    has_avx512: bool = False
    """Of the CPU: torch then has oneDNN compile matrix products in bfloat16."""

    def others(self) -> Iterator[tuple[str, Settings]]:
        """Settings that take less, the least change first, and what to write into a config for them."""
        changes = list(self._changes())
        for n in (1, 2, 3):
            for chosen in combinations(changes, n):
                keys = [change.key for change in chosen]
                other = replace(self, **{change.key: change.to for change in chosen})
                if len(set(keys)) == n and (other.device, other.residency) != ("host", "pinned"):
                    yield " with ".join(f"{change.place}: {change.value}" for change in reversed(chosen)), other

    def _changes(self) -> Iterator[_Change]:
        """Of one setting, those first that cost least."""
        kinds = ("device", "pinned", "disk") if self.device == "gpu" else ("device", "disk")
        after = kinds[kinds.index(self.residency) + 1 :] if self.residency in kinds else kinds[1:]
        yield from (_Change("residency", "memory.residency", kind, kind) for kind in after)
        if self.share is not None:
            others = sorted((n / 20 for n in range(1, 20)), key=lambda share: abs(share - (self.share or 0)))
            yield from (_Change("share", "engine.options.gpu_memory_utilization", str(n), n) for n in others)
        if self.engine == "transformers":
            fewer = (1 << k for k in range(20, -1, -1) if 1 << k < self.rows)
            yield from (_Change("rows", "engine.batch_size", str(n), n) for n in fewer)
        if self.dtype == "float32":
            yield _Change("dtype", "engine.dtype", "bfloat16", "bfloat16")
        if self.deltas == "exact":
            yield from (_Change("deltas", "memory.deltas", kind, kind) for kind in ("int8", "int4"))
        if self.device == "gpu" and self.engine == "transformers":
            yield _Change("device", "engine.device", "cpu", "host")


class _Change(NamedTuple):
    """Of one setting: its name here, what to write into a config, and what that means here."""

    key: str
    place: str
    value: str
    to: Any


@dataclass(frozen=True)
class Load:
    """What is generated and written down."""

    prompt: int
    """Tokens of the longest prompt."""
    answers: int
    """Of a candidate on the search split."""
    evaluations: int
    """Candidates, and held-out scores."""
    generations: int = 0
    genes: int = 0
    held_out: int = 0
    """Answers of a candidate on the held-out split."""

    @property
    def most(self) -> int:
        """Answers that an engine is asked for in one call; as some end, others are begun."""
        return max(self.answers, self.held_out)


@dataclass(frozen=True)
class Plan:
    """What a search takes."""

    items: tuple[Item, ...]
    model: int
    """Bytes of the resident model."""
    sources: int
    """Bytes of what is merged."""
    row: int
    """Bytes of one answer while it is decoded."""
    residency: Residency
    """Where what is merged lives: what `auto` comes to."""
    unknown: tuple[str, ...] = ()
    """What takes memory and is not counted."""
    short: str = ""
    """Why the engine could not start, however much is free; empty if it could."""

    def total(self, where: str) -> int:
        """Bytes in one place."""
        return sum(item.n_bytes for item in self.items if item.where == where)

    def fits(self, free: Mapping[str, int]) -> bool:
        """Whether no place is asked for more than is free there, and the engine could start."""
        return not self.short and all(self.total(where) <= n for where, n in free.items())


def make_plan(
    config: Config,
    sources: Sources,
    load: Load,
    settings: Settings,
    *,
    python_bytes: int,
    free: Mapping[str, int] | None = None,
) -> Plan:
    """Predict bytes.

    Args:
        config: of the search.
        sources: what it merges.
        load: what is generated.
        settings: with which.
        python_bytes: anonymous memory of Python with torch, transformers and the problems.
        free: bytes by place, which an automatic residency depends on.

    Raises:
        ValueError: if a residency cannot be had on the device.
    """
    device, interface = settings.device, sources.interface
    held = HELD.get(config.engine.kind, unknown)(config, interface, load, settings)
    room = {where: n - held.model * (where == device) for where, n in (free or {}).items()}
    residency = sources.choose(settings.residency, settings.deltas, device, room)
    items = [
        *held.items,
        Item(device, "a merge", sources.merge_bytes(settings.dtype, device)),
        *sources.items(residency, settings.deltas, device),
        Item("host", "Python and its libraries", python_bytes + LATER_BYTES),
        Item("disk", "the run folder", run_bytes(config, load)),
        Item("disk", "an export", export_bytes(interface)),
    ]
    if config.tracking.enabled:
        items.append(Item("host", "MLflow, a process of its own", MLFLOW_BYTES))
    return Plan(tuple(items), held.model, sources.n_bytes, held.row, residency, held.unknown, held.short)


def run_bytes(config: Config, load: Load) -> int:
    """Of the run folder: the ledger, the picture, and MLflow's store if it is in there."""
    text = min(N_SAMPLES, load.answers) * TOKEN_BYTES * config.engine.max_tokens // 2
    each = OUTCOME_BYTES + text + ANSWER_BYTES * load.answers + GENE_BYTES * load.genes
    ledger = LEDGER_BYTES + load.evaluations * each
    inside = config.tracking.enabled and config.tracking.uri is None
    pictures = 1 + (2 + load.generations if inside else 0)
    return ledger + pictures * PICTURE_BYTES + (STORE_BYTES if inside else 0)


def check(plan_of: Callable[[Settings], Plan], settings: Settings, free: Mapping[str, int]) -> Plan:
    """The plan with these settings.

    Args:
        plan_of: makes one.
        settings: of the config.
        free: bytes that are free, by place.

    Raises:
        PlanError: if it does not fit, naming what takes most and the setting that would make it fit.
    """
    plan = plan_of(settings)
    if plan.fits(free):
        return plan
    lines = [plan.short] if plan.short else []
    lines += [_misfit(plan, where, n) for where, n in free.items() if plan.total(where) > n]
    memory = {where: n for where, n in free.items() if where != "disk"}
    if not plan.fits(memory):
        helps = (f"{text} would fit." for text, other in settings.others() if plan_of(other).fits(memory))
        lines.append(next(helps, "No setting would help: use a machine with more memory, or smaller checkpoints."))
    if plan.total("disk") > free.get("disk", math.inf):
        lines.append("Free some of the disk, or give --out on another one.")
    raise PlanError("\n".join(lines))


def _misfit(plan: Plan, where: str, free: int) -> str:
    most = max((item for item in plan.items if item.where == where), key=lambda item: item.n_bytes)
    return (
        f"{where}: expected at most {size(free)}, which is free, but the search takes {size(plan.total(where))}, "
        f"of it {size(most.n_bytes)} for {most.what}."
    )
