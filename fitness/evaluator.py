"""Scores the resident model of an engine on a list of problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fitness.types import Completion, Engine, Problem, Score, Task


@dataclass(frozen=True)
class Evaluator:
    """Asks an engine, grades with a task. Keeps nothing between calls."""

    engine: Engine
    task: Task
    max_tokens: int

    def evaluate(self, problems: Sequence[Problem]) -> tuple[Score, list[Completion]]:
        """Score the resident model; completions come in the order of the problems."""
        prompts = [self.task.prompt(problem) for problem in problems]
        completions = self.engine.generate(prompts, max_tokens=self.max_tokens)
        verdicts = [self.task.grade(p, c) for p, c in zip(problems, completions, strict=True)]
        score = Score(
            problem_ids=tuple(problem.id for problem in problems),
            verdicts=np.array(verdicts, np.uint8)[:, None],
            n_tokens=np.array([c.n_tokens for c in completions], np.int32)[:, None],
            n_think_tokens=np.array([c.n_think_tokens for c in completions], np.int32)[:, None],
        )
        return score, completions
