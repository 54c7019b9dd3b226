"""Builds the parts of a run from its config: task, space, optimizer, worker, and the first candidates."""

from __future__ import annotations

import pkgutil

import numpy as np

from evo.checkpoint import Checkpoint, check_compatible
from evo.config import Config, component_options
from evo.merge import get_method
from evo.optimizers import OPTIMIZERS, Optimizer, SearchProblem
from evo.pareto import Scale
from evo.types import Candidate, Origin
from evo.worker import Worker
from fitness.engines import ENGINES
from fitness.tasks import TASKS
from fitness.types import Task
from search_spaces import SPACES
from search_spaces.genes import Gene, SearchSpace
from search_spaces.grouped import Ingredients
from search_spaces.recipe import Recipe, Rule, Source, copy_of


def build_task(config: Config) -> Task:
    """The task of a config."""
    task: Task = pkgutil.resolve_name(TASKS[config.task.kind])(**component_options(config.task, TASKS))
    return task


def build_space(
    config: Config, checkpoints: dict[str, Checkpoint], digests: dict[str, str] | None = None
) -> SearchSpace:
    """The search space of a config, laid out on its checkpoints."""
    method, knobs = get_method(config.space.method), config.space.knobs
    ingredients = Ingredients(
        sources=recipe_sources(config, digests or {}),
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
    space: SearchSpace = factory(layout, ingredients, **component_options(config.space, SPACES))
    return space


def build_optimizer(config: Config, problem: SearchProblem) -> Optimizer:
    """The optimizer of a config, fresh."""
    options = component_options(config.optimizer, OPTIMIZERS)
    optimizer: Optimizer = pkgutil.resolve_name(OPTIMIZERS[config.optimizer.kind])(problem, **options)
    return optimizer


def build_worker(config: Config, task: Task) -> Worker:
    """Load the resident model and all it takes to evaluate candidates."""
    import torch

    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    engine_class = pkgutil.resolve_name(ENGINES[config.engine.kind])
    engine = engine_class(str(config.parents[config.interface_parent]), **component_options(config.engine, ENGINES))
    sources = {name: str(path) for name, path in config.sources.items()}
    return Worker(engine, task, sources, max_tokens=config.engine.max_tokens, objectives=config.objectives)


def recipe_sources(config: Config, digests: dict[str, str]) -> dict[str, Source]:
    """The sources that recipes of a run name."""
    return {name: Source(str(path), digests.get(name)) for name, path in config.sources.items()}


def source_digests(config: Config) -> dict[str, str]:
    """Source name -> content digest. Reads every byte of every checkpoint."""
    return {name: Checkpoint.open(path).digest() for name, path in config.sources.items()}


def open_sources(config: Config) -> dict[str, Checkpoint]:
    """Open every checkpoint of a config and check that they can be merged.

    Raises:
        CheckpointError: with what is wrong.
    """
    checkpoints = {name: Checkpoint.open(path) for name, path in config.sources.items()}
    check_compatible(checkpoints)
    return checkpoints


def search_problem(config: Config, space: SearchSpace, scale: Scale | None = None) -> SearchProblem:
    """What an optimizer is told. Without a scale, a stand-in takes its place: enough to check options with."""
    n, parents = len(config.objectives), list(config.parents)
    starts = [space.uniform({name: 1.0}) for name in parents]
    starts.append(space.uniform({name: 1.0 / len(parents) for name in parents}))
    low, high = space.uniform({config.space_base: 1.0}), space.uniform({config.space_donors[0]: 1.0})
    return SearchProblem(
        n_genes=len(space.genes),
        scale=scale or Scale(np.zeros(n), np.ones(n)),
        seed=config.seed,
        starts=tuple(start for start in starts if start is not None),
        corners=None if low is None or high is None else (low, high),
    )


def first_candidates(config: Config, sources: dict[str, Source]) -> list[Candidate]:
    """Parents, the average, and points of the line from the last parent to the first."""
    parents, interface = list(config.parents), config.interface_parent
    recipes: list[tuple[str, Origin, Recipe]] = [
        (name, Origin.PARENT, copy_of(name, sources, interface)) for name in parents
    ]
    if config.baselines.average:
        shares = {name: 1.0 / len(parents) for name in parents[:-1]}
        recipes.append(("average", Origin.BASELINE, _mixture(parents[-1], shares, sources, interface)))
    points = np.linspace(0.0, 1.0, config.baselines.line_points + 2)[1:-1]
    for share in (float(p) for p in points):
        recipe = _mixture(parents[-1], {parents[0]: share}, sources, interface)
        recipes.append((f"line-{share:.3g}", Origin.BASELINE, recipe))
    return [Candidate(i, name, origin, 0, recipe) for i, (name, origin, recipe) in enumerate(recipes)]


def _mixture(base: str, shares: dict[str, float], sources: dict[str, Source], interface: str) -> Recipe:
    """Every tensor the same linear mixture of the sources."""
    return Recipe(sources, base, interface, (Rule("linear", shares),))
