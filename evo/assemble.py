"""Builds the parts of a run from its config: task, space, optimizer, worker, and the first candidates."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evo.adapter import open_checkpoints
from evo.checkpoint import Checkpoint
from evo.compatible import check_compatible, differing_settings
from evo.components import component_options, n_samples
from evo.config import Config, EngineConfig
from evo.hub import recipe_sources
from evo.merge import get_method
from evo.optimizers import OPTIMIZERS, Optimizer, SearchProblem, Start
from evo.pareto import Scale
from evo.types import Candidate, Origin
from evo.worker import Worker
from fitness.engines import ENGINES
from fitness.tasks import TASKS
from fitness.types import Engine, Task
from search_spaces import SPACES
from search_spaces.genes import Gene, SearchSpace
from search_spaces.grouped import Ingredients
from search_spaces.recipe import Recipe, Rule, Source


def build_task(config: Config) -> Task:
    """The task of a config."""
    task: Task = pkgutil.resolve_name(TASKS[config.task.kind])(**component_options(config.task))
    return task


def build_space(
    config: Config, checkpoints: dict[str, Checkpoint], digests: dict[str, str] | None = None
) -> SearchSpace:
    """The search space of a config, laid out on its checkpoints."""
    method, knobs = get_method(config.space.method), config.space.knobs
    ingredients = Ingredients(
        sources=recipe_sources(config.sources, digests or {}),
        base=config.space_base,
        donors=config.space_donors,
        interface=config.interface_parent,
        method=config.space.method,
        bounds=config.space.bounds,
        knobs={name: value for name, value in knobs.items() if not isinstance(value, tuple)},
        knob_genes=tuple(
            Gene(name, *value, step=method.knob(name, config.space_donors).step)
            for name, value in knobs.items()
            if isinstance(value, tuple)
        ),
        is_mixture=method.is_mixture,
        seed=config.seed,
    )
    factory = pkgutil.resolve_name(SPACES[config.space.kind])
    layout = checkpoints[config.interface_parent].layout
    space: SearchSpace = factory(layout, ingredients, **component_options(config.space))
    return space


def build_optimizer(config: Config, problem: SearchProblem) -> Optimizer:
    """The optimizer of a config, fresh."""
    options = component_options(config.optimizer)
    optimizer: Optimizer = pkgutil.resolve_name(OPTIMIZERS[config.optimizer.kind])(problem, **options)
    return optimizer


def load_engine(config: EngineConfig, checkpoint: Path, options: Mapping[str, Any]) -> Engine:
    """Load a model.

    Args:
        config: which engine, and its threads.
        checkpoint: folder of the model.
        options: of the engine.
    """
    import torch

    if config.threads:
        torch.set_num_threads(config.threads)
    engine: Engine = pkgutil.resolve_name(ENGINES[config.kind])(str(checkpoint), **options)
    return engine


def build_worker(config: Config, task: Task, batch_size: int | None) -> Worker:
    """Load the resident model and all it takes to evaluate candidates.

    Args:
        config: of the run.
        task: of the run.
        batch_size: what "auto" was found to mean when the run started; None if that is not known yet.
    """
    options = component_options(config.engine)
    if options.get("batch_size") == "auto" and batch_size is not None:
        options["batch_size"] = batch_size
    return Worker(
        load_engine(config.engine, config.sources[config.interface_parent], options),
        task,
        {name: str(path) for name, path in config.sources.items()},
        memory={**config.memory.model_dump(), "base": config.space_base},
        max_tokens=config.engine.max_tokens,
        objectives=config.objectives,
        orderliness=config.orderliness,
        samples=n_samples(options),
        seed=config.seed,
    )


def source_digests(config: Config) -> dict[str, str]:
    """Source name -> content digest. Reads every byte of every checkpoint."""
    return {name: checkpoint.digest() for name, checkpoint in open_checkpoints(config.sources).items()}


def open_sources(config: Config) -> dict[str, Checkpoint]:
    """Open every checkpoint of a config and check that they can be merged.

    Raises:
        CheckpointError: with what is wrong.
    """
    checkpoints = open_checkpoints(config.sources)
    checkpoints[config.interface_parent].written_map()  # an adapter has none
    check_compatible(checkpoints, common_rows=config.vocabulary == "common")
    return checkpoints


def notes_on(config: Config, checkpoints: dict[str, Checkpoint]) -> list[str]:
    """What to tell of checkpoints before a search: where they differ silently, and tensors that no score knows of."""
    name = config.interface_parent
    notes = differing_settings(checkpoints, name)
    if unscored := checkpoints[name].layout.unscored:
        notes.append(
            f"{len(unscored)} tensor(s) are not used to generate text, so nothing scores them; exports get those of "
            f"{name!r}: {', '.join(unscored[:3])}{', ...' if len(unscored) > 3 else ''}"
        )
    return notes


def search_problem(
    config: Config, space: SearchSpace, scale: Scale | None = None, starts: tuple[Start, ...] = ()
) -> SearchProblem:
    """What an optimizer is told. Without a scale, a stand-in takes its place: enough to check options with."""
    n = len(config.objectives)
    low, high = space.uniform({config.space_base: 1.0}), space.uniform({config.space_donors[0]: 1.0})
    return SearchProblem(
        n_genes=len(space.genes),
        scale=scale or Scale(np.zeros(n), np.ones(n)),
        seed=config.seed,
        starts=starts,
        corners=None if low is None or high is None else (low, high),
    )


def first_candidates(config: Config, space: SearchSpace, sources: dict[str, Source]) -> list[Candidate]:
    """Parents, then the plain merges that the config asks for. Those that the space can express have a genome."""
    parents = list(config.parents)
    mixtures: list[tuple[str, Origin, dict[str, float]]] = [(p, Origin.PARENT, {p: 1.0}) for p in parents]
    if config.baselines.average:
        mixtures.append(("average", Origin.BASELINE, {p: 1.0 / len(parents) for p in parents}))
    n_points = config.baselines.line_points
    n_digits = max(3, len(str(n_points)) + 1)  # tells neighbours apart
    for share in map(float, np.linspace(0.0, 1.0, n_points + 2)[1:-1]):
        line = {parents[0]: share, parents[-1]: 1.0 - share}
        if any(line == shares for _, _, shares in mixtures):  # the middle is the average of two parents
            continue
        mixtures.append((f"line-{share:.{n_digits}g}", Origin.BASELINE, line))
    interface = config.interface_parent
    found = [
        Candidate(i, name, origin, 0, _mixture(shares, sources, interface), space.uniform(shares))
        for i, (name, origin, shares) in enumerate(mixtures)
    ]
    if config.baselines.swaps:
        for name, genome in space.swaps().items():
            found.append(Candidate(len(found), name, Origin.BASELINE, 0, space.decode(genome), genome))
    return found


def _mixture(shares: dict[str, float], sources: dict[str, Source], interface: str) -> Recipe:
    """Every tensor the same linear mixture of the sources; the last one named is the base."""
    *donors, base = shares
    rules = (Rule("linear", {name: shares[name] for name in donors}),) if donors else ()
    return Recipe(sources, base, interface, rules)
