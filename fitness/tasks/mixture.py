"""Several tasks as one: each gives problems in proportion to its weight.

A mean over the problems of a mixture is so the weighted mean over its tasks, with nothing else to keep.
"""

from __future__ import annotations

import inspect
import math
import pkgutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from fitness.splits import Size, problems_of
from fitness.types import Completion, Problem, Split, Task, Verdict


class Mixture:
    """A weighted mixture.

    Args:
        tasks: each with `kind`, `weight` (1 where it is not given) and the options of that task, except
            sizes. A part whose kind has only a public test set counts in held-out alone.
        search, reserve, held_out: problems of each split, over all parts.

    Raises:
        ValueError: for an unknown kind or option, a weight that is not positive, or data that cannot be read.
    """

    def __init__(
        self,
        *,
        tasks: Sequence[Mapping[str, Any]],
        search: Size = 200,
        reserve: Size = 100,
        held_out: Size = 400,
    ) -> None:
        if not tasks:
            raise ValueError("tasks: expected at least one")
        for i, part in enumerate(tasks):
            for key, said in mistakes_of(part):
                raise ValueError(f"tasks.{i}.{key}: {said}")
        self._sizes = {Split.SEARCH: search, Split.RESERVE: reserve, Split.HELD_OUT: held_out}
        self._tasks, self._weights = list(tasks), [part.get("weight", 1) for part in tasks]
        self._owner: dict[str, Task] = {}
        self._splits: dict[Split, list[Problem]] = {}
        taken: set[str] = set()
        for split in (Split.HELD_OUT, Split.RESERVE, Split.SEARCH):  # a question of two parts stays where it first is
            self._splits[split] = self._gather(split, taken)
            taken |= {problem.id for problem in self._splits[split]}

    def problems(self, split: Split) -> list[Problem]:
        """See Task."""
        return self._splits[split]

    def prompt(self, problem: Problem) -> str:
        """See Task."""
        return self._owner[problem.id].prompt(problem)

    def grade(self, problem: Problem, completion: Completion) -> Verdict:
        """See Task."""
        return self._owner[problem.id].grade(problem, completion)

    def _gather(self, split: Split, taken: set[str]) -> list[Problem]:
        """Of each part its share, without questions that have been taken."""
        parts = [(part, w) for part, w in zip(self._tasks, self._weights, strict=True) if _serves(part, split)]
        if not parts:
            raise ValueError(f"tasks: none of them has problems for the split '{split}'")
        found: dict[str, Problem] = {}
        for (part, _), n in zip(parts, shares([w for _, w in parts], self._sizes[split]), strict=True):
            if n:
                task, fresh = _draw(part, split, n, taken | found.keys())
                found |= {problem.id: problem for problem in fresh}
                self._owner |= dict.fromkeys((problem.id for problem in fresh), task)
        return list(found.values())


def _draw(part: Mapping[str, Any], split: Split, n: int, taken: Collection[str]) -> tuple[Task, list[Problem]]:
    """A part and its first n problems that have not been taken.

    Raises:
        ValueError: if it has fewer.
    """
    asked = n
    while True:
        try:
            task = _build(part, {str(split): asked})
            problems = problems_of(task, str(part["kind"]), [split])[split]
        except ValueError as error:
            if asked == n:
                raise
            raise ValueError(
                f"tasks: {part['kind']!r} has to give {n} problems for the split '{split}', and has too few that no "
                f"part before it has: give it other data or less weight, or ask for fewer ({error})"
            ) from error
        fresh = [problem for problem in problems if problem.id not in taken]
        if len(fresh) >= n:
            return task, fresh[:n]
        asked += n - len(fresh)


def mistakes_of(part: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a part must not say, as (key, what was expected), but for its task's own options."""
    weight = part.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        yield "weight", f"expected weights above 0, got {weight!r}"
    if part.get("kind") == "mixture":
        yield "kind", "expected a task of its own: put those of an inner mixture beside the others"
    for size in (split for split in Split if split in part):
        yield size, f"a mixture shares out its problems by weight: expected `{size}` beside `tasks`"


def shares(weights: Sequence[float], n: int) -> list[int]:
    """Parts of n in whole numbers in proportion to weights: largest remainders first (Hamilton's method)."""
    exact = [n * weight / sum(weights) for weight in weights]
    found = [int(value) for value in exact]
    for i in sorted(range(len(exact)), key=lambda i: found[i] - exact[i])[: n - sum(found)]:
        found[i] += 1
    return found


def _serves(part: Mapping[str, Any], split: Split) -> bool:
    from fitness.tasks.named import PRESETS

    preset = PRESETS.get(str(part.get("kind")), {"path": ""})
    return split is Split.HELD_OUT or "path" in preset or "path" in part or bool(part.get("search_on_test"))


def _build(part: Mapping[str, Any], sizes: Mapping[str, int]) -> Task:
    from fitness.tasks import TASKS

    kind, options = part.get("kind"), {k: v for k, v in part.items() if k not in ("kind", "weight")}
    if not isinstance(kind, str) or kind not in TASKS:
        known = ", ".join(name for name in TASKS if name != "mixture")
        raise ValueError(f"tasks: expected a kind of {known}, got {kind!r}")
    target = pkgutil.resolve_name(TASKS[kind])
    allowed = {n for n, p in inspect.signature(target).parameters.items() if p.kind is p.KEYWORD_ONLY}
    allowed -= {str(split) for split in Split}
    if unknown := options.keys() - allowed:
        expected = ", ".join(sorted(allowed))
        raise ValueError(f"tasks: {kind!r} has no option {sorted(unknown)[0]!r}: expected some of {expected}")
    task: Task = target(**options, **sizes)
    return task
