"""Procedural families of reasoning-gym (extra `reasoning-gym`), by name and difficulty.

Worked instance (chain_sum): question "State the final answer to the following arithmetic problem: 4 + 3 =", answer "7".
Families grade their own answers, some of them with sympy, which may take for ever: hence in a process apart. Partial
credit below 1 counts as wrong.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from fitness.apart import MAX_CHARACTERS, Apart
from fitness.graders import answer_part, grade
from fitness.splits import SHARES, MadeSize, take
from fitness.types import Completion, Problem, Seed, Split, Verdict


class ReasoningGym:
    """Problems of one family.

    Args:
        family: a name of reasoning-gym, such as "chain_sum" or "countdown".
        difficulty: parameters of the family, such as {min_terms: 2, max_terms: 4}.
        template: the prompt, with {question} where the question goes.
        search, reserve, held_out: number of problems of each split.
        seed: of the problems and of their split.

    Raises:
        ValueError: if the package is missing, or the family or a parameter is unknown.
    """

    def __init__(
        self,
        *,
        family: str,
        difficulty: Mapping[str, Any] | None = None,
        template: str = "{question}\nGive the answer alone after the thinking, as <answer>...</answer>.",
        search: MadeSize = 200,
        reserve: MadeSize = 100,
        held_out: MadeSize = 400,
        seed: Seed = 0,
    ) -> None:
        try:
            import reasoning_gym
        except ImportError as error:
            raise ValueError(
                f"task reasoning_gym needs reasoning-gym ({error}): pip install 'mergefront[reasoning-gym]'"
            ) from error
        self._sizes = {Split.SEARCH: search, Split.RESERVE: reserve, Split.HELD_OUT: held_out}
        self._template, self._seed = template, seed
        n = int(2 * max(self._sizes[split] / SHARES[split] for split in Split)) + 100  # families repeat themselves
        try:
            made = reasoning_gym.create_dataset(family, seed=seed, size=n, **(difficulty or {}))
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"reasoning_gym: family {family!r} with {dict(difficulty or {})}: {error}") from error
        self._made_by = family, json.dumps(difficulty or {})
        self._entries: dict[str, Any] = {}
        for entry in made:
            self._entries.setdefault(str(entry["question"]), entry)

    def problems(self, split: Split) -> list[Problem]:
        """See Task."""
        found = (Problem(question, str(entry["answer"])) for question, entry in self._entries.items())
        return take(found, split, self._sizes[split], self._seed)

    def prompt(self, problem: Problem) -> str:
        """See Task."""
        return self._template.replace("{question}", problem.question)

    def grade(self, problem: Problem, completion: Completion) -> Verdict:
        """See Task."""

        def same(_: str, text: str) -> bool | None:
            answer = answer_part(text).rpartition("<answer>")[2].partition("</answer>")[0].strip()
            if not answer:
                return None
            solved: bool = _apart(*self._made_by, answer[-MAX_CHARACTERS:], self._entries[problem.question])
            return solved

        return grade(same, problem.answer, completion)


def solves(family: str, difficulty: str, answer: str, entry: Mapping[str, Any]) -> bool:
    """Whether an answer solves a problem, as its family sees it.

    Args:
        family: its name.
        difficulty: parameters of the family, in JSON.
        answer: to grade.
        entry: what the family made of the problem.
    """
    try:
        return bool(_family(family, difficulty).score_answer(answer, entry) >= 1.0)
    except Exception:  # families parse answers in ways of their own
        return False


@functools.cache
def _family(name: str, difficulty: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, size=1, **json.loads(difficulty))


_apart = Apart("fitness.tasks.reasoning_gym:solves", "reasoning_gym", "reasoning-gym")
