"""Any table with a question and an answer column: a JSONL file, or a data set by its hub name.

Worked instance (openai/gsm8k):
    question  "Natalia sold clips to 48 of her friends in April, and then half as many in May. ..."
    answer    "... 48+24 = <<48+24=72>>72 clips altogether in April and May. #### 72"
"""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from fitness.graders import GRADERS, grade
from fitness.splits import take
from fitness.types import Completion, Problem, Split, Verdict

Size = Annotated[int, Ge(1)]


class Table:
    """Problems read through `datasets`.

    Args:
        path: a .jsonl file, or a data set name such as "openai/gsm8k".
        question, answer: names of the columns.
        name, subset: configuration and split of a hub data set, e.g. "main" and "train".
        template: the prompt, with {question} where the question goes.
        grader: a name in fitness.graders.GRADERS.
        search, reserve, held_out: number of problems of each split; None takes all there are.
        seed: decides which problem falls in which split.

    Raises:
        ValueError: if the data cannot be read or lack a column.
    """

    def __init__(
        self,
        *,
        path: str,
        question: str = "question",
        answer: str = "answer",
        name: str | None = None,
        subset: str = "train",
        template: str = "{question}",
        grader: str = "number",
        search: Size | None = None,
        reserve: Size | None = None,
        held_out: Size | None = None,
        seed: Annotated[int, Ge(0)] = 0,
    ) -> None:
        if "{question}" not in template:
            raise ValueError(f"template: expected a text with {{question}} in it, got {template!r}")
        if grader not in GRADERS:
            raise ValueError(f"grader: expected one of {', '.join(GRADERS)}, got {grader!r}")
        self._template = template
        self._grader = pkgutil.resolve_name(GRADERS[grader])
        self._sizes = {Split.SEARCH: search, Split.RESERVE: reserve, Split.HELD_OUT: held_out}
        self._seed = seed
        rows = _load(path, name, subset)
        if missing := [column for column in (question, answer) if column not in rows.column_names]:
            raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(rows.column_names)}")
        pairs = zip(rows[question], rows[answer], strict=True)
        self._problems = [Problem(str(q), str(a)) for q, a in pairs if q is not None and a is not None]

    def problems(self, split: Split) -> list[Problem]:
        """See Task."""
        return take(self._problems, split, self._sizes[split], self._seed)

    def prompt(self, problem: Problem) -> str:
        """See Task."""
        return self._template.replace("{question}", problem.question)

    def grade(self, problem: Problem, completion: Completion) -> Verdict:
        """See Task."""
        return grade(self._grader, problem.answer, completion)


def _load(path: str, name: str | None, subset: str) -> Any:
    import datasets  # heavy: only loaded by runs that read a table

    datasets.disable_progress_bars()
    try:
        if path.endswith((".jsonl", ".json")):
            if not Path(path).is_file():
                raise ValueError(f"no such file: {path}")
            return datasets.Dataset.from_json(path)
        return datasets.load_dataset(path, name, split=subset)
    except (OSError, datasets.exceptions.DatasetsError, ConnectionError) as error:
        raise ValueError(f"cannot read data set {path!r}: {error}") from error
