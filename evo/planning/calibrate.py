"""Loads the model and tries the parents and a merge between them, to tell how long a search takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from evo.assemble import build_space, build_worker, first_candidates, recipe_sources
from evo.config import Config
from evo.planning.machine import FRONT_SIZE, Planned, n_first
from evo.planning.times import search_seconds, span
from evo.types import Candidate, Status
from evo.worker import Worker
from fitness.types import Split

CALIBRATION_SECONDS = 115.0
"""Two minutes, loading included, and something to spare."""


class CalibrationError(RuntimeError):
    """A model could not be tried."""


def calibrated(planned: Planned, seconds: float = CALIBRATION_SECONDS) -> Iterator[str]:
    """Lines for a terminal. Each candidate is scored on more and more of the search problems as long as there is time,
    and extrapolated to all of them.

    Raises:
        CalibrationError: if a model cannot be scored.
    """
    config, task, deadline = planned.config, planned.task, time.monotonic() + seconds
    worker = build_worker(config, task, planned.settings.rows)
    space = build_space(config, planned.checkpoints)
    first = first_candidates(config, space, recipe_sources(config, {}))
    tried = [*first[: len(config.parents)], replace(first[0], name="a merge", recipe=_interior(config, space, first))]
    found = []
    for n_left, candidate in zip(range(len(tried), 0, -1), tried, strict=True):
        share = (deadline - time.monotonic()) / n_left
        found.append(measure(worker, candidate, len(task.problems(Split.SEARCH)), share))
        yield f"{candidate.name}: {span(found[-1][0])} a candidate, {found[-1][1]:,.0f} tokens"
    mean, tokens = (sum(values) / len(found) for values in zip(*found, strict=True))
    yield f"the search: {span(search_seconds(config.budget, mean, tokens))}"
    n_scored = FRONT_SIZE + n_first(config, space)
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
    count, spent = min(n, 4), 0.0
    while True:
        evaluation = worker.evaluate(candidate, Split.SEARCH, count)
        if evaluation.status is Status.FAILED or evaluation.score is None:
            raise CalibrationError(f"{candidate.name} cannot be scored: {evaluation.detail['reason']}")
        tries.append((count, evaluation.seconds, float(evaluation.score.n_generated)))
        spent += evaluation.seconds
        following = min(n, 4 * count)
        if count == n or spent + extrapolated(tries, following)[0] > seconds:
            return extrapolated(tries, n)
        count = following


def extrapolated(tries: list[tuple[int, float, float]], n: int) -> tuple[float, float]:
    """Seconds and tokens on `n` problems, from tries (problems, seconds, tokens), ascending."""
    count, seconds, tokens = tries[-1]
    before = tries[-2] if len(tries) > 1 else (0, 0.0, 0.0)
    slope = max(0.0, (seconds - before[1]) / (count - before[0]))
    return seconds + slope * (n - count), tokens * n / count
