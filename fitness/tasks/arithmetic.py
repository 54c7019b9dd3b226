"""The built-in task: chained arithmetic modulo 100, read strictly from left to right. Needs no data.

Worked instance:
    question            11+2*3-9
    answer              30                       ((11 + 2) * 3 - 9) mod 100
    concise trace       11+2=13;13*3=39;39-9=30;
    verbose trace       11+2=13?11+2=13?11+2=13ok;13*3=39?13*3=39?13*3=39ok;39-9=30?39-9=30?39-9=30ok;

The two traces are the styles in which the built-in parents were taught (experiments/chimera_mini). Both
compute a step in the same local text; the verbose one repeats it. Models learn from questions of their own:
one in four, by a checksum of its text, is theirs and belongs to no split.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import Literal

from fitness.graders import grade, same_number
from fitness.splits import SHARES, MadeSize, take
from fitness.types import Completion, Problem, Seed, Split, Verdict

MODULUS = 100
MULTIPLY_RATE = 0.25
"""Share of `*` among the steps; about a third of the problems have none."""


class Arithmetic:
    """Procedural problems with 3 to 5 operations.

    Args:
        search, reserve, held_out: number of problems of each split.
        seed: of the problems and of their split.
    """

    def __init__(
        self, *, search: MadeSize = 256, reserve: MadeSize = 256, held_out: MadeSize = 512, seed: Seed = 0
    ) -> None:
        self._sizes = {Split.SEARCH: search, Split.RESERVE: reserve, Split.HELD_OUT: held_out}
        self._seed = seed

    def problems(self, split: Split) -> list[Problem]:
        """See Task."""
        n_drawn = int(3 * self._sizes[split] / SHARES[split]) + 1000  # some are for training, some repeat
        fresh = (q for q in questions(self._seed, MULTIPLY_RATE) if not is_for_training(q))
        problems = (Problem(question, str(solve(question))) for question in islice(fresh, n_drawn))
        return take(problems, split, self._sizes[split], self._seed)

    def prompt(self, problem: Problem) -> str:
        """See Task."""
        return problem.question

    def grade(self, problem: Problem, completion: Completion) -> Verdict:
        """See Task."""
        return grade(same_number, problem.answer, completion)


def questions(seed: int, multiply_rate: float) -> Iterator[str]:
    """An endless stream of questions; the same seed gives the same stream. May repeat itself."""
    rng = random.Random(seed)
    while True:
        text = str(rng.randrange(MODULUS))
        for _ in range(rng.randint(3, 5)):
            if rng.random() < multiply_rate:
                text += f"*{rng.randint(2, 5)}"
            else:
                text += f"{rng.choice('+-')}{rng.randint(1, 9)}"
        yield text


def is_for_training(question: str) -> bool:
    """Whether a question may be used to train a model, and so never to score one."""
    return zlib.crc32(question.encode()) % 4 == 0


def steps(question: str) -> list[tuple[str, int]]:
    """Each step's text and its result: [("11+2", 13), ("13*3", 39), ...]."""
    start, *rest = re.findall(r"\d+|[+*-]", question)
    value, done = int(start), []
    for symbol, digit in zip(rest[::2], rest[1::2], strict=True):
        text, n = f"{value}{symbol}{digit}", int(digit)
        value = (value + n if symbol == "+" else value - n if symbol == "-" else value * n) % MODULUS
        done.append((text, value))
    return done


def solve(question: str) -> int:
    """The answer: every operation in the order in which it is written, modulo 100 at each step."""
    return steps(question)[-1][1]


def trace(question: str, style: Literal["concise", "verbose"]) -> str:
    """The worked steps, as they stand between the think tags."""
    return "".join(
        f"{text}={value};" if style == "concise" else f"{text}={value}?{text}={value}?{text}={value}ok;"
        for text, value in steps(question)
    )
