"""Evaluates candidates: one resident model that every candidate is written into.

Knows nothing of what is searched or why; a pool may run many of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from evo import interrupts
from evo.types import Candidate, Evaluation, Status
from fitness.evaluator import Evaluator
from fitness.objectives import losses
from fitness.orderliness import Orderliness
from fitness.types import Completion, Engine, Problem, Split, Task

N_SAMPLES = 3
"""Completions of each candidate that are kept as text, to be read by a person."""


class Worker:
    """Joins an engine, a task and the checkpoints."""

    def __init__(
        self,
        engine: Engine,
        task: Task,
        sources: Mapping[str, str],
        *,
        memory: Mapping[str, Any] | None = None,
        max_tokens: int,
        objectives: Sequence[str],
        orderliness: Orderliness,
        samples: int = 1,
        seed: int = 0,
    ) -> None:
        self._engine = engine
        self._evaluator = Evaluator(engine, task, max_tokens, orderliness, samples, seed)
        self._task = task
        self._objectives = objectives
        self._problems: dict[Split, list[Problem]] = {}
        engine.host("evo.materializer:Materializer.hosted", sources=dict(sources), **(memory or {}))

    @property
    def batch_size(self) -> int | None:
        """Of the engine; None while an automatic choice has not been made."""
        return self._engine.batch_size

    @property
    def caveat(self) -> str | None:
        """Of the engine."""
        return self._engine.caveat

    def evaluate(
        self, candidate: Candidate, split: Split, limit: int | None = None, *, compressed: bool = False
    ) -> Evaluation:
        """Materialize a candidate and score it. A candidate that cannot be scored is data: never raises for it.

        Args:
            candidate: what to evaluate.
            split: whose problems.
            limit: the first so many of them; None for all.
            compressed: whether donors may be merged as they are compressed.
        """
        start = time.perf_counter()
        try:
            report = self._engine.update({**candidate.recipe.to_dict(), "compressed": compressed})
            problems = self._problems_of(split)[:limit]
            generate_start = time.perf_counter()
            score, completions = self._evaluator.evaluate(problems)
        except Exception as error:  # whatever a merge can do to a model ends here, not the run
            if interrupts.pending():
                raise KeyboardInterrupt from error
            return Evaluation(
                candidate.id,
                Status.FAILED,
                time.perf_counter() - start,
                detail={"reason": f"{type(error).__name__}: {error}"},
            )
        return Evaluation(
            candidate.id,
            Status.DONE,
            time.perf_counter() - start,
            losses=losses(score, self._objectives),
            score=score,
            detail={
                "write_seconds": report.seconds,
                "generate_seconds": time.perf_counter() - generate_start,
                "n_written": report.n_written,
                "n_skipped": report.n_skipped,
                "n_compiled": report.n_compiled,
                "samples": self._samples(problems, completions),
                **({"delta_errors": dict(report.delta_errors)} if compressed else {}),
            },
        )

    def _problems_of(self, split: Split) -> list[Problem]:
        if split not in self._problems:
            self._problems[split] = self._task.problems(split)
        return self._problems[split]

    def _samples(
        self, problems: Sequence[Problem], completions: Sequence[Sequence[Completion]]
    ) -> list[dict[str, Any]]:
        return [
            {
                "question": problem.question,
                "answer": problem.answer,
                "completion": completion.text,
                "n_tokens": completion.n_tokens,
                "verdict": self._task.grade(problem, completion).name.lower(),
            }
            for problem, (completion, *_) in zip(problems[:N_SAMPLES], completions, strict=False)
        ]
