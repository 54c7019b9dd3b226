"""Scores the resident model of an engine on a list of problems."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fitness.orderliness import Orderliness
from fitness.types import Completion, Engine, Problem, Score, Task, Verdict


@dataclass(frozen=True)
class Evaluator:
    """Asks an engine, grades with a task. Keeps nothing between calls.

    Args:
        orderliness: what counts as orderly.
        samples: completions of each problem.
        seed: of the draws, which are the same for every model that is scored with it.
    """

    engine: Engine
    task: Task
    max_tokens: int
    orderliness: Orderliness = field(default_factory=Orderliness)
    samples: int = 1
    seed: int = 0

    def check(self, problems: Sequence[Problem]) -> None:
        """See to it that some answer may be as long as max_tokens.

        Args:
            problems: all of a split: of some alone, none need leave as much room.

        Raises:
            ValueError: saying what to lower.
        """
        room = self.engine.room([self.task.prompt(problem) for problem in problems])
        if room is not None and room < self.max_tokens:
            remedy = f"lower max_tokens to {room} or less" if room else "ask for shorter prompts"
            raise ValueError(
                f"of {len(problems)} prompts, none leaves room for an answer of {self.max_tokens} tokens (max_tokens) "
                f"in the model's context: {remedy}"
            )

    def evaluate(self, problems: Sequence[Problem]) -> tuple[Score, list[list[Completion]]]:
        """Score the resident model; the completions of each problem come in the order of the problems.

        Raises:
            ValueError: if the task grades with anything but a Verdict.
        """
        repeated = [problem for problem in problems for _ in range(self.samples)]
        seeds = [draw_seed(self.seed, problem, i) for problem in problems for i in range(self.samples)]
        prompts = [self.task.prompt(problem) for problem in repeated]
        completions = self.engine.generate(prompts, max_tokens=self.max_tokens, seeds=seeds)
        verdicts = [self.task.grade(p, c) for p, c in zip(repeated, completions, strict=True)]
        if odd := [verdict for verdict in verdicts if not isinstance(verdict, Verdict)]:
            name = f"{type(self.task).__name__}.grade"  # a truth value would be stored as the verdict of that number
            raise ValueError(f"{name}: expected a Verdict, such as Verdict.CORRECT, got {odd[0]!r:.100}")
        shape = (len(problems), self.samples)
        order = [self.orderliness.measure(completion) for completion in completions]
        score = Score(
            problem_ids=tuple(problem.id for problem in problems),
            verdicts=np.array(verdicts, np.uint8).reshape(shape),
            n_tokens=np.array([c.n_tokens for c in completions], np.int32).reshape(shape),
            n_think_tokens=np.array([c.n_think_tokens for c in completions], np.int32).reshape(shape),
            orderliness={
                name: np.array([measured[name] for measured in order]).reshape(shape) for name in (order or [{}])[0]
            },
        )
        n = self.samples
        return score, [completions[i : i + n] for i in range(0, len(completions), n)]


def draw_seed(seed: int, problem: Problem, sample: int) -> int:
    """The seed of one completion, in [0, 2^64): of the run, the problem's text and the sample's number alone."""
    text = f"{seed}:{problem.id}:{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
