"""Any table with a question and an answer column: a JSONL or parquet file, or a data set by its hub name.

Worked instance (openai/gsm8k):
    question  "Natalia sold clips to 48 of her friends in April, and then half as many in May. ..."
    answer    "... 48+24 = <<48+24=72>>72 clips altogether in April and May. #### 72"
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fitness.graders import get_grader, grade
from fitness.splits import TRAINING_SHARES, Size, take
from fitness.types import Completion, Problem, Seed, Split, Verdict

MOST_ODD_ANSWERS = 0.1
"""Share of the answers that a grader may not be able to read."""


class Table:
    """Problems read through `datasets`.

    With `test_subset` (or `test_path`), search and reserve come from the training data and held-out problems
    from the test data; a question that stands in both is left to the test data. Without, one table is cut in
    three. Either way a hash of the text decides, so that splits never share a problem.

    Args:
        path: a .jsonl, .json or .parquet file, or a data set name such as "openai/gsm8k".
        question, answer: names of the columns.
        options: name of a column with a list of options, which are appended to the question.
        name: configuration of a hub data set, e.g. "main".
        subset: its split that problems are taken from.
        revision: of a hub data set: a branch, tag or commit.
        test_path: where held-out problems come from; default: where the training data do.
        test_subset: the split of them; default: that of the training data.
        template: the prompt, with {question} where the question goes.
        grader: what tells right from wrong: "number", "choice" (a letter), "exact" (text), or "math" (expressions,
            extra `math`).
        search, reserve, held_out: number of problems of each split; default: all there are.
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
        options: str | None = None,
        name: str | None = None,
        subset: str = "train",
        revision: str | None = None,
        test_path: str | None = None,
        test_subset: str | None = None,
        template: str = "{question}",
        grader: str = "number",
        search: Size | None = None,
        reserve: Size | None = None,
        held_out: Size | None = None,
        seed: Seed = 0,
    ) -> None:
        if "{question}" not in template:
            raise ValueError(f"template: expected a text with {{question}} in it, got {template!r}")
        self._grader = get_grader(grader)
        self._template = template
        self._sizes = {Split.SEARCH: search, Split.RESERVE: reserve, Split.HELD_OUT: held_out}
        self._seed = seed
        columns = (question, answer, options)
        self._problems = read(path, columns, name, subset, revision)
        self._check_answers(path, self._problems, grader)
        self._test = None
        if test_path or test_subset:
            self._test = read(test_path or path, columns, name, test_subset or subset, revision)
            self._check_answers(test_path or path, self._test, grader)
            public = {problem.question for problem in self._test}
            self._problems = [problem for problem in self._problems if problem.question not in public]

    def _check_answers(self, path: str, problems: list[Problem], grader: str) -> None:
        """Refuse answers that their grader cannot read: whatever a model says would be wrong."""
        if grader not in ("number", "choice"):
            return
        odd = [p.answer for p in problems if not self._grader(p.answer, p.answer)]
        if len(odd) > MOST_ODD_ANSWERS * len(problems):
            raise ValueError(
                f"grader: {grader!r} cannot read {len(odd)} of the {len(problems)} answers in {path}, such as "
                f"{odd[0][:50]!r}: expected another grader (exact, math, choice, number) or another column"
            )

    def problems(self, split: Split) -> list[Problem]:
        """See Task."""
        size = self._sizes[split]
        if self._test is None:
            return take(self._problems, split, size, self._seed)
        if split is Split.HELD_OUT:
            return take(self._test, split, size, self._seed, {split: 1.0})
        return take(self._problems, split, size, self._seed, TRAINING_SHARES)

    def prompt(self, problem: Problem) -> str:
        """See Task."""
        return self._template.replace("{question}", problem.question)

    def grade(self, problem: Problem, completion: Completion) -> Verdict:
        """See Task."""
        return grade(self._grader, problem.answer, completion)


def read(
    path: str, columns: tuple[str, str, str | None], name: str | None, subset: str, revision: str | None
) -> list[Problem]:
    """The problems of a table, without rows that lack a question or an answer.

    Raises:
        ValueError: if the data cannot be read, lack a column or hold no problem.
    """
    rows = _load(path, name, subset, revision)
    wanted = [column for column in columns if column is not None]
    if missing := [column for column in wanted if column not in rows.column_names]:
        raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(rows.column_names)}")
    values = [rows[column] for column in wanted]
    found = [
        Problem("\n".join([str(question).strip(), *map(str, options[0] if options else ())]), str(answer).strip())
        for question, answer, *options in zip(*values, strict=True)
        if str(question or "").strip() and answer is not None and str(answer).strip()
    ]
    if not found:
        raise ValueError(f"{path} holds no row with both a {wanted[0]!r} and an {wanted[1]!r}")
    return found


_OTHER_TABLES = (".csv", ".tsv", ".txt", ".xls", ".xlsx", ".arrow", ".gz", ".zip")
"""What is meant as a file, and would be looked for on the Hub."""


def _load(path: str, name: str | None, subset: str, revision: str | None) -> Any:
    import datasets  # heavy: only loaded by runs that read a table

    datasets.disable_progress_bars()
    readers = {".jsonl": "from_json", ".json": "from_json", ".parquet": "from_parquet"}
    if (suffix := Path(path).suffix) not in readers and (Path(path).is_file() or suffix in _OTHER_TABLES):
        raise ValueError(
            f"{path}: expected a .jsonl, .json or .parquet file, or the name of a data set; convert it first"
        )
    try:
        if suffix in readers:
            if not Path(path).is_file():
                raise ValueError(f"no such file: {path}")
            if not Path(path).stat().st_size:
                raise ValueError(f"{path} is empty")
            return getattr(datasets.Dataset, readers[suffix])(path)
        return datasets.load_dataset(path, name, split=subset, revision=revision)
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError, ConnectionError) as error:
        raise ValueError(
            f"cannot read data set {path!r}: {error}. Without a network, give a file: path: FILE.jsonl"
        ) from error
