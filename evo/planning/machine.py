"""Plans a search on this machine: asks it what is free and how fast it copies. Loads no weights."""

from __future__ import annotations

import inspect
import math
import pkgutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evo.assemble import (
    build_optimizer,
    build_space,
    build_task,
    first_candidates,
    open_sources,
    search_problem,
)
from evo.checkpoint import Checkpoint
from evo.components import component_options, n_samples
from evo.config import Config
from evo.hub import recipe_sources
from evo.in_place import free_disk
from evo.planning.batching import Batch
from evo.planning.footprint import DTYPE_BYTES, cache_token_bytes, model_bytes, row_bytes
from evo.planning.plan import Load, Plan, PlanError, Settings, check, make_plan
from evo.planning.ranks import rank_table
from evo.planning.sources import Sources, used_sources
from evo.planning.times import candidate_seconds, search_seconds, size, span
from fitness.engines import ENGINES
from fitness.engines.memory import ROW_LOGIT_BYTES, anonymous_bytes, free_bytes, missing_gpu, rows_that_fit, total_bytes
from fitness.engines.outline import described, outline_of
from fitness.engines.transformers import longest_prompt
from fitness.engines.vllm import cache_bytes, share_of_memory
from fitness.splits import problems_of
from fitness.types import Split, Task

FRONT_SIZE = 8
"""Members of a front that are scored on held-out problems, as a guess."""
CANDIDATES = 1000
"""As many as a search is taken to evaluate where its budget does not say."""
COPIED_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Kind of device -> what is copied to measure it: GPUs have caches of up to 126 MB."""


@dataclass(frozen=True)
class Planned:
    """A plan, and what it was made from."""

    config: Config
    checkpoints: dict[str, Checkpoint]
    task: Task
    load: Load
    settings: Settings
    plan: Plan
    free: dict[str, int]
    """Bytes, by place."""
    bandwidth: float
    """Bytes a second that a copy reads and writes."""
    arrival: float | None = None
    """Bytes a second at which sources come to a GPU from the host; None where they are merged where they are."""

    @property
    def batch(self) -> Batch:
        """Of answers that are decoded together."""
        model, dtype = self.checkpoints[self.config.interface_parent].config(), self.settings.dtype
        token, outline = cache_token_bytes(model, DTYPE_BYTES[dtype]), outline_of(model, getattr(torch, dtype))
        refilled = outline is None or outline.columnar
        return Batch(self.settings.rows, self.load.prompt, self.plan.model, token, refilled)

    def report(self, tokens: float | None) -> Iterator[str]:
        """Lines for a terminal: bytes by place, then seconds.

        Args:
            tokens: mean tokens of an answer, if somebody knows.
        """
        for where in ("gpu", "host", "mapped", "disk"):
            if items := [item for item in self.plan.items if item.where == where and item.n_bytes]:
                room = f" of {size(self.free[where])} free" if where in self.free else ", pages that may be dropped"
                yield f"{where}: {size(self.plan.total(where))}{room}"
                yield from (f"  {size(item.n_bytes):>12}  {item.what}" for item in items)
        yield from (f"not counted: {what}" for what in self.plan.unknown)
        if self.settings.residency == "auto":
            yield f"memory.residency: auto is {self.plan.residency} here"
        most, plan, load = self.config.engine.max_tokens, self.plan, self.load
        context = _context(self.config, self.checkpoints[self.config.interface_parent])
        if context is not None and load.prompt + most > context:
            yield (
                f"the longest prompt has {load.prompt} tokens: with max_tokens {most} that exceeds the context of "
                f"{context}, so answers to it are cut off earlier, and count as wrong"
            )
        low, high = (tokens, tokens) if tokens else (most / 8, float(most))
        there, arriving = (plan.sources, 0.0) if self.arrival is None else (0, plan.sources / self.arrival)
        fast, slow = candidate_seconds(
            plan.model + there, plan.model, plan.row, self.settings.rows, load.answers, (low, high), self.bandwidth,
            arriving,
        )  # fmt: skip
        yield f"a candidate: {span(fast)} to {span(slow)}; --calibrate measures it"
        between = f"{low:.0f}" if tokens else f"{low:.0f} to {high:.0f}"
        yield f"  at {size(self.bandwidth)} a second, and {between} tokens an answer"
        if self.arrival is not None:
            yield f"  what is merged comes from the host, at {size(self.arrival)} a second at the most"
        limits = [search_seconds(self.config.budget, s, t * load.answers) for s, t in ((fast, high), (slow, low))]
        yield f"the search: {span(min(limits))} to {span(max(limits))}, and the held-out scores"


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
    checkpoints, task, options = open_sources(config), build_task(config), component_options(config.engine)
    device = device_of(options)
    free = free or {
        **({"gpu": free_bytes(device)} if device.type == "cuda" else {}),
        "host": free_bytes(torch.device("cpu")),
        "disk": free_disk(out),
    }
    interface = checkpoints[config.interface_parent]
    load = _load(config, checkpoints, task, options)
    context = _context(config, interface)
    if context is not None and config.engine.max_tokens >= context:
        raise PlanError(
            f"engine.max_tokens is {config.engine.max_tokens}, but the model's context has room for {context} tokens, "
            f"the prompt among them (the longest has {load.prompt}): lower it"
        )
    where = "gpu" if device.type == "cuda" else "host"
    memory, share = config.memory, None
    if config.engine.kind == "vllm" and cache_bytes(options.get("options") or {}, device.type) is None:
        share = share_of_memory(options.get("options") or {})
    settings = Settings(
        where,
        options.get("dtype", "bfloat16"),
        load.most,
        memory.residency,
        memory.deltas,
        config.engine.kind,
        total_bytes(device),
        share,
        torch.backends.cpu.get_cpu_capability().startswith("AVX512"),
    )
    sources, room = Sources(config, checkpoints), free[where] if where in free else free_bytes(device)
    plan_of = partial(make_plan, config, sources, load, python_bytes=anonymous_bytes(), free=free)
    kept = sources.kept(plan_of(settings).residency, memory.deltas, where)
    room -= sum(item.n_bytes for item in kept if item.where == where)  # they are there before an answer is begun
    settings = replace(settings, rows=min(load.most, _batch_size(config, interface, load, options, device, room)))
    plan = check(plan_of, settings, free)
    arrives = device.type == "cuda" and sources.place(plan.residency, where) != where
    arrival = arrival_bandwidth(device) if arrives else None
    return Planned(config, checkpoints, task, load, settings, plan, free, copy_bandwidth(device), arrival)


def ranks_report(config: Config, n_ranks: int) -> Iterator[str]:
    """Lines of a table of what each of `n_ranks` processes holds; seconds are at this machine's bandwidth."""
    options = component_options(config.engine)
    dtype = getattr(torch, options.get("dtype", "bfloat16"))
    sources = list(used_sources(config, open_sources(config)).values())
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield from rank_table(sources, dtype, n_ranks, copy_bandwidth(here))


def device_of(options: dict[str, Any]) -> torch.device:
    """Where the engine would put the model.

    Raises:
        PlanError: if that is a GPU that is not there.
    """
    asked = options.get("device", "auto")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked)
    if missing := missing_gpu(device):
        raise PlanError(
            f"engine.device is {asked!r}, but torch sees {missing} here: plan where the search will run, or with auto"
        )
    return device


def _context(config: Config, interface: Checkpoint) -> int | None:
    """Tokens that a prompt and its answer may have together."""
    found: int | None = described(interface.config()).get("max_position_embeddings")
    given = (config.engine.options.get("options") or {}).get("max_model_len")  # of vLLM
    return given if config.engine.kind == "vllm" and isinstance(given, int) and given > 0 else found


def n_first(config: Config, space: Any) -> int:
    """Parents and baselines."""
    return len(first_candidates(config, space, recipe_sources(config.sources, {})))


def _load(config: Config, checkpoints: dict[str, Checkpoint], task: Task, options: dict[str, Any]) -> Load:
    """What is generated and written."""
    problems = problems_of(task, config.task.kind, (Split.SEARCH, Split.HELD_OUT))
    prompts = [task.prompt(problem) for found in problems.values() for problem in found]
    chat = {key: options[key] for key in ("system", "chat") if key in options}
    prompt = longest_prompt(str(checkpoints[config.interface_parent].path), prompts, **chat)
    samples = n_samples(options)
    space = build_space(config, checkpoints)
    first, n = n_first(config, space), config.budget.candidates or CANDIDATES
    population = build_optimizer(config, search_problem(config, space)).batch_size
    return Load(
        prompt,
        answers=samples * len(problems[Split.SEARCH]),
        evaluations=n + first + FRONT_SIZE,
        generations=math.ceil(max(0, n - first) / population),
        genes=len(space.genes),
        held_out=samples * len(problems[Split.HELD_OUT]),
    )


def _batch_size(
    config: Config, interface: Checkpoint, load: Load, options: dict[str, Any], device: torch.device, free: int
) -> int:
    """What the config says, or what the engine would find."""
    parameters = inspect.signature(pkgutil.resolve_name(ENGINES[config.engine.kind])).parameters
    batch: int | str = options.get("batch_size", parameters["batch_size"].default if "batch_size" in parameters else 1)
    if isinstance(batch, int):
        return batch
    dtype = options.get("dtype", "bfloat16")
    model = interface.config()
    row = row_bytes(model, load.prompt + config.engine.max_tokens, DTYPE_BYTES[dtype])
    row += ROW_LOGIT_BYTES * int(described(model)["vocab_size"])
    return rows_that_fit(row, free - model_bytes(interface, dtype), device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that are read and written by a copy on a device."""
    n_bytes = COPIED_BYTES[device.type]
    if device.type == "cuda":
        n_bytes = min(n_bytes, free_bytes(device) // 4)
    return 2 * _copied_a_second(device, device, n_bytes)


def arrival_bandwidth(device: torch.device) -> float:
    """Bytes a second that a GPU copies from the host's memory where it is pinned; from a disk come fewer."""
    return _copied_a_second(torch.device("cpu"), device, COPIED_BYTES["cpu"])


def _copied_a_second(origin: torch.device, device: torch.device, n_bytes: int) -> float:
    """Bytes: the best of four."""
    source = torch.ones(n_bytes, dtype=torch.uint8, device=origin, pin_memory=origin != device)
    target, best = torch.empty(n_bytes, dtype=torch.uint8, device=device), math.inf
    n_copies = 16 if device.type == "cuda" else 1  # a GPU copies sooner than it is asked and waited for
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(n_copies):
            target.copy_(source, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    del source, target
    torch.cuda.empty_cache()  # an engine in a process of its own sees what this one holds on to as used
    return n_bytes * n_copies / best
