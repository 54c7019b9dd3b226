"""What a search takes of GPU, host and disk, and the setting that makes it fit.

Pure arithmetic over footprint.py: nothing is loaded, and what the machine has is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from evo.checkpoint import Checkpoint
from evo.config import Config
from evo.planning.footprint import (
    DTYPE_BYTES,
    MIB,
    cache_row_bytes,
    export_bytes,
    merge_bytes,
    model_bytes,
    source_bytes,
    step_row_bytes,
)
from evo.planning.times import size

CUDA_BYTES = 512 * MIB
"""Context and kernels on a GPU. Not measured."""
LATER_BYTES = 20 * MIB
"""Of libraries and model code that a search imports and a plan does not (0 to 45 MB were measured)."""
MLFLOW_BYTES = 340 * MIB
"""Of the process that writes to MLflow and draws pictures, as measured."""
LEDGER_BYTES, OUTCOME_BYTES, ANSWER_BYTES, GENE_BYTES = 150_000, 2_000, 9, 4
"""Of the ledger: at first, and for each evaluation, with its answers and genes."""
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

    def others(self) -> Iterator[tuple[str, Settings]]:
        """Settings that take less, the least change first, and what to write into a config for them."""
        fewer = [n for n in (1 << k for k in range(20, -1, -1)) if n < self.rows]
        yield from ((f"engine.batch_size: {n}", replace(self, rows=n)) for n in fewer)
        if self.dtype == "float32":
            half = replace(self, dtype="bfloat16")
            yield "engine.dtype: bfloat16", half
            for n in fewer:
                yield f"engine.dtype: bfloat16 with engine.batch_size: {n}", replace(half, rows=n)
        if self.device == "gpu":
            yield "engine.device: cpu", replace(self, device="host")


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


@dataclass(frozen=True)
class Item:
    """Bytes that something takes somewhere."""

    where: str
    """gpu, host, mapped (pages of files, which the kernel may drop) or disk."""
    what: str
    n_bytes: int


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

    def total(self, where: str) -> int:
        """Bytes in one place."""
        return sum(item.n_bytes for item in self.items if item.where == where)

    def fits(self, free: Mapping[str, int]) -> bool:
        """Whether no place is asked for more than is free there."""
        return all(self.total(where) <= n for where, n in free.items())


def make_plan(
    config: Config, checkpoints: Mapping[str, Checkpoint], load: Load, settings: Settings, python_bytes: int
) -> Plan:
    """Predict bytes.

    Args:
        config: of the search.
        checkpoints: its sources, open; only their headers are read.
        load: what is generated.
        settings: with which.
        python_bytes: anonymous memory of Python with torch, transformers and the problems.
    """
    device, interface = settings.device, checkpoints[config.interface_parent]
    model = model_bytes(interface, settings.dtype)
    sizes = interface.config(), load.prompt, config.engine.max_tokens, DTYPE_BYTES[settings.dtype]
    cached, step = cache_row_bytes(*sizes), step_row_bytes(*sizes)
    sources = source_items(config, checkpoints, device)
    items = [
        Item(device, "the resident model", model),
        Item(device, f"cached keys and values of {settings.rows} answers", cached * settings.rows),
        Item(device, "a pass through a layer, and logits", step * settings.rows),
        Item(device, "a merge", merge_bytes(config.space.method, interface)),
        *sources,
        Item("host", "Python and its libraries", python_bytes + LATER_BYTES),
        Item("disk", "the run folder", run_bytes(config, load)),
        Item("disk", "an export", export_bytes(interface)),
    ]
    if config.tracking.enabled:
        items.append(Item("host", "MLflow, a process of its own", MLFLOW_BYTES))
    if device == "gpu":
        items += [Item("host", "the model while it is loaded", model), Item("gpu", "CUDA", CUDA_BYTES)]
    return Plan(tuple(items), model, sum(item.n_bytes for item in sources), cached + step)


def source_items(config: Config, checkpoints: Mapping[str, Checkpoint], device: str) -> list[Item]:
    """Where what is merged is kept: beside the model on a GPU, mapped on a CPU."""
    where = "gpu" if device == "gpu" else "mapped"
    return [
        Item(where, f"the checkpoint {name}", source_bytes(c)) for name, c in used_sources(config, checkpoints).items()
    ]


def used_sources(config: Config, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Those that a search reads: not an ancestor that its method does not start from."""
    used = {*config.parents, config.space_base, *config.space_donors}
    return {name: checkpoint for name, checkpoint in checkpoints.items() if name in used}


def run_bytes(config: Config, load: Load) -> int:
    """Of the run folder: the ledger, the picture, and MLflow's store if it is in there."""
    ledger = LEDGER_BYTES + load.evaluations * (OUTCOME_BYTES + ANSWER_BYTES * load.answers + GENE_BYTES * load.genes)
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
    lines = [_misfit(plan, where, n) for where, n in free.items() if plan.total(where) > n]
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
