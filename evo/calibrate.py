"""Plans a search on this machine: asks it what is free and how fast it copies; on request, tries the model itself."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from evo.assemble import build_space, build_task, build_worker, first_candidates, open_sources, recipe_sources
from evo.checkpoint import Checkpoint
from evo.config import Config, component_options
from evo.plan import DTYPE_BYTES, Load, Plan, cache_row_bytes, candidate_seconds, make_plan, model_bytes, shards, size
from evo.types import Candidate, Status
from evo.worker import Worker
from fitness.engines import ENGINES
from fitness.engines.memory import free_bytes, rows_that_fit
from fitness.engines.transformers import longest_prompt
from fitness.types import Decoding, Split, Task

CALIBRATION_SECONDS = 120.0
FRONT_SIZE = 8
"""Members of a front that are scored on held-out problems, as a guess."""


class CalibrationError(RuntimeError):
    """A model could not be tried."""


@dataclass(frozen=True)
class Planned:
    """A plan, and what it was made from."""

    config: Config
    checkpoints: dict[str, Checkpoint]
    task: Task
    load: Load
    plan: Plan
    free: dict[str, int]
    """Bytes, by place."""
    bandwidth: float
    """Bytes a second that a copy reads and writes."""

    def report(self, tokens: float | None) -> Iterator[str]:
        """Lines for a terminal: bytes by place, then seconds.

        Args:
            tokens: mean tokens of an answer, if somebody knows.
        """
        for where in ("gpu", "host", "mapped", "disk"):
            if items := [item for item in self.plan.items if item.where == where]:
                room = f" of {size(self.free[where])} free" if where in self.free else ", pages that may be dropped"
                yield f"{where}: {size(self.plan.total(where))}{room}"
                yield from (f"  {size(item.n_bytes):>12}  {item.what}" for item in items)
        most = self.config.engine.max_tokens
        low, high = (tokens, tokens) if tokens else (most / 8, float(most))
        fast, slow = candidate_seconds(self.plan, self.load, (low, high), self.bandwidth)
        yield f"a candidate: {span(fast)} to {span(slow)}; --calibrate measures it"
        yield f"  at {size(self.bandwidth)} a second, and {low:.0f} to {high:.0f} tokens an answer"
        limits = [self._seconds(s, t) for s, t in ((fast, high), (slow, low))]
        yield f"the search: {span(min(limits))} to {span(max(limits))}, and the held-out scores"

    def _seconds(self, candidate: float, tokens: float) -> float:
        return search_seconds(self.config, candidate, tokens * self.load.answers)


def rank_table(config: Config, n_ranks: int) -> Iterator[str]:
    """Lines of a table: the fullest of `n_ranks` ranks under each layout. Seconds are at this machine's bandwidth."""
    options = component_options(config.engine, ENGINES)
    device = _device(options)
    bandwidth = copy_bandwidth(device)
    yield f"{f'the fullest of {n_ranks} ranks':<24}{'model':>12}{'sources':>12}{'a merge':>12}"
    for shard in shards(open_sources(config).values(), options.get("dtype", "bfloat16"), n_ranks):
        n_bytes = f"{size(shard.model_bytes):>12}{size(shard.source_bytes):>12}"
        yield f"  {shard.layout + '-parallel':<22}{n_bytes}{span(shard.seconds(bandwidth)):>12}"


def plan_search(config: Config, *, out: Path, free: dict[str, int] | None = None) -> Planned:
    """Plan a search, without loading its model.

    Args:
        config: of the search.
        out: where its files will go, or a folder above.
        free: bytes by place (gpu, host, disk); default: what this machine has.

    Raises:
        CheckpointError: if the parents cannot be merged.
        PlanError: if the search does not fit.
    """
    checkpoints, task, options = open_sources(config), build_task(config), component_options(config.engine, ENGINES)
    device = _device(options)
    where, dtype = "gpu" if device.type == "cuda" else "host", options.get("dtype", "bfloat16")
    there = next(folder for folder in (out, *out.resolve().parents) if folder.is_dir())
    free = free or {where: free_bytes(device), "host": free_bytes(torch.device("cpu"))}
    free = {"disk": shutil.disk_usage(there).free, **free}
    load = _load(config, checkpoints[config.interface_parent], task, options, device, free[where])
    plan = make_plan(config, checkpoints, load, device=where, dtype=dtype)
    plan.check(free)
    return Planned(config, checkpoints, task, load, plan, free, copy_bandwidth(device))


def _device(options: dict[str, Any]) -> torch.device:
    """Where the engine would put the model."""
    asked = options.get("device", "auto")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked)


def _load(
    config: Config, interface: Checkpoint, task: Task, options: dict[str, Any], device: torch.device, free: int
) -> Load:
    problems = {split: task.problems(split) for split in (Split.SEARCH, Split.HELD_OUT)}
    prompts = [task.prompt(problem) for found in problems.values() for problem in found]
    chat = {key: options[key] for key in ("system", "chat") if key in options}
    prompt, samples = longest_prompt(str(interface.path), prompts, **chat), options.get("decoding", Decoding()).samples
    batch, dtype = options.get("batch_size", 32), options.get("dtype", "bfloat16")
    if batch == "auto":
        row = cache_row_bytes(interface.config(), prompt, config.engine.max_tokens, DTYPE_BYTES[dtype])
        batch = rows_that_fit(row, free - model_bytes(interface, dtype), device)
    most = samples * max(map(len, problems.values()))
    return Load(prompt, min(batch, most), samples * len(problems[Split.SEARCH]))


def copy_bandwidth(device: torch.device, n_bytes: int = 64 << 20) -> float:
    """Bytes a second that are read and written by a copy: the best of three."""
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), math.inf
    for _ in range(4):
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n_bytes / best


def calibrated(planned: Planned, seconds: float = CALIBRATION_SECONDS) -> Iterator[str]:
    """Load the model and try the parents and a merge between them; lines for a terminal.

    Each is scored on more and more of the search problems as long as there is time, and extrapolated to all of them.

    Raises:
        CalibrationError: if a model cannot be scored.
    """
    config, task = planned.config, planned.task
    worker = build_worker(config, task, planned.load.rows)
    space = build_space(config, planned.checkpoints)
    first = first_candidates(config, space, recipe_sources(config, {}))
    tried = [*first[: len(config.parents)], replace(first[0], name="a merge", recipe=_interior(config, space, first))]
    found = []
    deadline = time.monotonic() + seconds
    for n_left, candidate in zip(range(len(tried), 0, -1), tried, strict=True):
        share = (deadline - time.monotonic()) / n_left
        found.append(measure(worker, candidate, len(task.problems(Split.SEARCH)), share))
        yield f"{candidate.name}: {span(found[-1][0])} a candidate, {found[-1][1]:,.0f} tokens"
    mean, tokens = (sum(values) / len(found) for values in zip(*found, strict=True))
    search = search_seconds(config, mean, tokens)
    yield f"the search: {span(search)}"
    n_scored = FRONT_SIZE + len(first)
    ratio = len(task.problems(Split.HELD_OUT)) / len(task.problems(Split.SEARCH))
    yield f"the held-out scores: about {span(n_scored * ratio * mean)}, if {n_scored} models are scored"


def _interior(config: Config, space: Any, first: list[Candidate]) -> Any:
    """A recipe of the space itself: halfway between base and first donor."""
    genome = space.uniform({config.space_base: 0.5, config.space_donors[0]: 0.5})
    return first[0].recipe if genome is None else space.decode(genome)


def measure(worker: Worker, candidate: Candidate, n: int, seconds: float) -> tuple[float, float]:
    """Seconds and tokens that a candidate takes on `n` problems.

    The last two sizes that were tried make a line: a step costs something however few answers take part in it.
    """
    tries: list[tuple[int, float, float]] = []
    size_, spent = min(n, 4), 0.0
    while True:
        evaluation = worker.evaluate(candidate, Split.SEARCH, size_)
        if evaluation.status is Status.FAILED or evaluation.score is None:
            raise CalibrationError(f"{candidate.name} cannot be scored: {evaluation.detail['reason']}")
        tries.append((size_, evaluation.seconds, float(evaluation.score.n_generated)))
        spent += evaluation.seconds
        following = min(n, 4 * size_)
        if size_ == n or spent + extrapolated(tries, following)[0] > seconds:
            return extrapolated(tries, n)
        size_ = following


def extrapolated(tries: list[tuple[int, float, float]], n: int) -> tuple[float, float]:
    """Seconds and tokens on `n` problems, from tries (problems, seconds, tokens), ascending."""
    count, seconds, tokens = tries[-1]
    before = tries[-2] if len(tries) > 1 else (0, 0.0, 0.0)
    slope = max(0.0, (seconds - before[1]) / (count - before[0]))
    return seconds + slope * (n - count), tokens * n / count


def search_seconds(config: Config, candidate: float, tokens: float) -> float:
    """Of a whole budget, from a candidate's seconds and tokens: whichever limit comes first."""
    budget = config.budget
    limits = [
        budget.candidates and budget.candidates * candidate,
        budget.tokens and math.ceil(budget.tokens / tokens) * candidate,
        budget.hours and 3600 * budget.hours,
    ]
    return min(limit for limit in limits if limit)


def span(seconds: float) -> str:
    """A time for people."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
