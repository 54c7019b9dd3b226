"""Loads the model and tries the parents and a merge between them, to tell how long a search takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from evo.assemble import build_space, build_worker, first_candidates
from evo.config import Config
from evo.hub import recipe_sources
from evo.planning.machine import FRONT_SIZE, Planned, n_first
from evo.planning.times import search_seconds, spans
from evo.planning.trial import Try, estimate, explore, priced
from evo.types import Candidate, Evaluation, Status
from evo.worker import Worker
from fitness.types import Split

CALIBRATION_SECONDS = 110.0
"""Two minutes, loading included, and something to spare for the first merges, which take longer than later ones."""


class CalibrationError(RuntimeError):
    """A model could not be tried."""


def calibrated(planned: Planned, tokens: float | None = None, seconds: float = CALIBRATION_SECONDS) -> Iterator[str]:
    """Lines for a terminal. Where answers do not end in time, times are a range, unless their tokens are known.

    Args:
        planned: the search.
        tokens: mean tokens of an answer, if somebody knows.
        seconds: that there are. A load or a merge that takes longer is not broken off.

    Raises:
        CalibrationError: if a model cannot be scored.
    """
    config, task, deadline = planned.config, planned.task, time.monotonic() + seconds
    worker = build_worker(config, task, planned.settings.rows)
    space = build_space(config, planned.checkpoints)
    first = first_candidates(config, space, recipe_sources(config.sources, {}))
    merges = [replace(first[0], name="a merge", recipe=_interior(config, space, first, share)) for share in (0.4, 0.5)]
    write = [_evaluate(worker, config, merge, 1, 1).detail["write_seconds"] for merge in merges][-1]
    n, n_held = len(task.problems(Split.SEARCH)), len(task.problems(Split.HELD_OUT))
    samples = planned.load.answers // n
    batch, most = planned.batch, config.engine.max_tokens
    tried = [merges[-1], *first[: len(config.parents)]]
    tries: list[Try] = []
    lasts: list[Try] = []
    for n_left, candidate in zip(range(len(tried), 0, -1), tried, strict=True):
        left = (deadline - time.monotonic()) / n_left
        tries += explore(Asker(worker, config, candidate), n, batch, samples, most, left, tries)
        lasts.append(tries[-1])
        yield f"{candidate.name}: tried {lasts[-1].n} of {n} problems, answers up to {lasts[-1].cap} tokens"
    each = priced(tries, batch)
    found = [estimate(last, each, n, batch, most, tokens) for last in lasts]
    held = [estimate(last, each, n_held, batch, most, tokens).seconds for last in lasts]
    for candidate, one in zip(tried, found, strict=True):
        took = spans(*(write + seconds for seconds in one.seconds))
        yield f"{candidate.name}: {took} a candidate, {_range(*one.tokens)} tokens"
    lows, highs = ([(one.seconds[end] + write, one.tokens[end]) for one in found] for end in (0, 1))
    ends = [tuple(sum(column) / len(found) for column in zip(*of, strict=True)) for of in (lows, highs)]
    low, high = (search_seconds(config.budget, *end) for end in ends)
    yield f"the search: {spans(low, high)}" + ("; --tokens N says how long answers are" if high > 1.01 * low else "")
    n_scored = FRONT_SIZE + n_first(config, space)
    times = (n_scored * (write + sum(column) / len(held)) for column in zip(*held, strict=True))
    yield f"the held-out scores: about {spans(*times)}, if {n_scored} models are scored"


def _range(low: float, high: float) -> str:
    return f"{low:,.0f}" if high < 1.01 * low else f"{low:,.0f} to {high:,.0f}"


def _interior(config: Config, space: Any, first: list[Candidate], share: float) -> Any:
    """A recipe of the space itself: between base and first donor."""
    genome = space.uniform({config.space_base: 1.0 - share, config.space_donors[0]: share})
    return first[0].recipe if genome is None else space.decode(genome)


class Asker:
    """Tries a candidate: see trial.Ask. Its seconds are those of all but merging."""

    def __init__(self, worker: Worker, config: Config, candidate: Candidate) -> None:
        self._worker, self._config, self._candidate = worker, config, candidate

    def __call__(self, n: int, cap: int) -> Try:
        """See trial.Ask. Raises CalibrationError if the candidate cannot be scored."""
        evaluation = _evaluate(self._worker, self._config, self._candidate, n, cap)
        assert evaluation.score is not None
        lengths = evaluation.score.n_tokens
        seconds = evaluation.seconds - evaluation.detail["write_seconds"]
        return Try(n, cap, seconds, tuple(lengths.ravel().tolist()))


def _evaluate(worker: Worker, config: Config, candidate: Candidate, n: int, cap: int) -> Evaluation:
    """Raises CalibrationError if it cannot be scored."""
    compressed = config.memory.deltas != "exact"
    evaluation = worker.evaluate(candidate, Split.SEARCH, n, compressed=compressed, max_tokens=cap)
    if evaluation.status is Status.FAILED or evaluation.score is None:
        raise CalibrationError(f"{candidate.name} cannot be scored: {evaluation.detail['reason']}")
    return evaluation
