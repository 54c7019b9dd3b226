"""Evaluates candidates: one resident model that every candidate is written into.

Knows nothing of what is searched or why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evo import interrupts
from evo.errors import said
from evo.types import Candidate, Evaluation, Status
from fitness.evaluator import Evaluator
from fitness.objectives import losses
from fitness.orderliness import Orderliness
from fitness.proxy.trial import Stop, Trial, joined
from fitness.types import Completion, Engine, Problem, Score, Split, Task
from search_spaces.recipe import Recipe

N_SAMPLES = 3
"""Completions of each candidate that are kept as text, to be read by a person."""


@dataclass(frozen=True)
class _Answers:
    """What came of asking a model."""

    score: Score | None
    """None if it was asked nothing."""
    written: list[tuple[int, list[Completion]]]
    """Positions of the problems asked this time, and what was written."""
    asked: NDArray[np.int64]
    """Positions of all problems asked so far, in the order of the score."""
    stop: Stop | None
    n_forced: int


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
        self,
        candidate: Candidate,
        split: Split,
        limit: int | None = None,
        *,
        compressed: bool = False,
        trial: Trial | None = None,
        max_tokens: int | None = None,
    ) -> Evaluation:
        """Materialize a candidate and score it. A candidate that cannot be scored is data: never raises for it.

        Args:
            candidate: what to evaluate.
            split: whose problems.
            limit: the first so many of them; None for all, and with a trial.
            compressed: whether donors may be merged as they are compressed.
            trial: may stop it before all of them have been asked.
            max_tokens: of an answer, to try how long it takes; None for what the run says.
        """
        start = time.perf_counter()
        try:
            report = self._engine.update({**candidate.recipe.to_dict(), "compressed": compressed})
            problems = self._problems_of(split)[:limit]
            generate_start = time.perf_counter()
            answers = self._ask(problems, trial, max_tokens)
        except Exception as error:  # whatever a merge can do to a model ends here, not the run
            failed_after = time.perf_counter() - start
            return Evaluation(candidate.id, Status.FAILED, failed_after, detail={"reason": _said(error)})
        detail = {
            "write_seconds": report.seconds,
            "generate_seconds": time.perf_counter() - generate_start,
            "n_written": report.n_written,
            "n_skipped": report.n_skipped,
            "n_compiled": report.n_compiled,
            "samples": self._samples([(problems[i], completions) for i, completions in answers.written]),
            **({"delta_errors": dict(report.delta_errors)} if compressed else {}),
            **({"n_forced": answers.n_forced} if answers.n_forced else {}),
            **({"n_before": trial.before.score.n_generated} if trial and trial.before else {}),
        }
        seconds, score, stop = time.perf_counter() - start, answers.score, answers.stop
        if stop is None:
            assert score is not None, "only a stopped candidate is asked nothing"
            found = losses(score, self._objectives)
            return Evaluation(candidate.id, Status.DONE, seconds, found, score=score, detail=detail)
        detail |= {"reason": stop.reason, "stopped_by": stop.member}
        detail |= {"problems": answers.asked.tolist(), "n_saved": self._saved(answers, stop, len(problems))}
        if stop.promise is not None and score is not None:  # kept for when it goes on
            orderliness = {name: values.round(4).tolist() for name, values in score.orderliness.items()}
            detail |= {"promise": stop.promise, "orderliness": orderliness}
        return Evaluation(candidate.id, Status.PARTIAL, seconds, stop.losses, score=score, detail=detail)

    def cannot_answer(self, recipe: Recipe) -> str | None:
        """Why the engine no longer writes and asks a model at all; None if it does.

        Args:
            recipe: of a model that has been scored before.
        """

        def ask() -> None:
            problem = self._problems_of(Split.SEARCH)[0]
            self._engine.generate([self._task.prompt(problem)], max_tokens=4)

        return self.cannot_write(recipe) or _reason(ask)

    def cannot_write(self, recipe: Recipe, *, compressed: bool = False) -> str | None:
        """Why a recipe cannot be written into the model; None if it can."""
        return _reason(lambda: self._engine.update({**recipe.to_dict(), "compressed": compressed}))

    def _saved(self, answers: _Answers, stop: Stop, n_problems: int) -> int:
        """Tokens that all problems would have taken, as far as is known, less those that some took."""
        score = answers.score
        mean = score.tokens_mean if score else 0.0
        if "tokens" in self._objectives:
            mean = float(stop.losses[list(self._objectives).index("tokens")])
        n_answers = n_problems * self._evaluator.samples
        return round(mean * n_answers) - (score.n_generated if score else 0)

    def _ask(self, problems: Sequence[Problem], trial: Trial | None, max_tokens: int | None) -> _Answers:
        """Block after block; a model that answers everything has its answers in the split's own order."""
        before = trial.before if trial else None
        parts = [before.score] if before else []
        asked = before.problems if before else np.zeros(0, np.int64)
        if trial and before and (stop := trial.beaten(before.score, asked)):
            return _Answers(before.score, [], asked, stop, 0)  # the front has moved since
        reason, n_forced = trial.screen.unlikely(self._engine) if trial and not before else (None, 0)
        if trial and reason:
            return _Answers(None, [], asked, Stop(f"collapsed: {reason}", trial.worst), n_forced)
        evaluator = replace(self._evaluator, max_tokens=max_tokens) if max_tokens else self._evaluator
        written: list[tuple[int, list[Completion]]] = []
        for block in trial.blocks() if trial else [np.arange(len(problems))]:
            score, completions = evaluator.evaluate([problems[i] for i in block])
            parts.append(score)
            written += zip(block.tolist(), completions, strict=True)
            asked = np.concatenate([asked, block])
            if trial and (stop := trial.judge(joined(parts), asked)):
                return _Answers(joined(parts), written, asked, stop, n_forced)
        order = np.argsort(asked)
        written.sort(key=lambda pair: pair[0])
        return _Answers(joined(parts).take(order), written, asked[order], None, n_forced)

    def _problems_of(self, split: Split) -> list[Problem]:
        if split not in self._problems:
            problems = self._task.problems(split)
            self._evaluator.check(problems)
            self._problems[split] = problems
        return self._problems[split]

    def _samples(self, written: Sequence[tuple[Problem, Sequence[Completion]]]) -> list[dict[str, Any]]:
        return [
            {
                "question": problem.question,
                "answer": problem.answer,
                "completion": completion.text,
                "n_tokens": completion.n_tokens,
                "verdict": self._task.grade(problem, completion).name.lower(),
            }
            for problem, (completion, *_) in written[:N_SAMPLES]
        ]


def _reason(do: Callable[[], object]) -> str | None:
    """Why something fails; None if it does not."""
    try:
        do()
    except Exception as error:
        return _said(error)
    return None


def _said(error: Exception) -> str:
    """An error in one line, unless it came of an interrupt.

    Raises:
        KeyboardInterrupt: then.
    """
    if interrupts.pending():
        raise KeyboardInterrupt from error
    return f"{type(error).__name__}: {said(error)}"
