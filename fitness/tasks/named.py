"""Public reasoning tasks by name: data, not code. Each is a preset of the `table` task.

Search and reserve problems come from the training data. A task without any is for held-out scores
(`mergefront eval`, or as a part of a mixture): a search that selects on a public test set makes its numbers on
that set worthless, so it takes an explicit `search_on_test: true`, which cuts the test set in three by hash.

Every preset takes the options of Named. A file given as `path` (and `test_path`) has the columns `question` and
`answer` unless `question` and `answer` say otherwise.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from fitness.splits import Size
from fitness.tasks.table import Table
from fitness.types import Problem, Seed, Split

_BOXED = "{question}\nPut the final answer in \\boxed{}."
_LETTER = "{question}\nPut the letter of the right option in \\boxed{}."
_TEST = {"test_subset": "test"}
_MATH = {"question": "problem", "grader": "math"}
_AIME = {"question": "problem", "grader": "number"}
_MGSM = {"name": "en", "revision": "refs/convert/parquet", "answer": "answer_number"}
_AQUA = {"name": "raw", "options": "options", "answer": "correct", "template": _LETTER, "grader": "choice"}
_BBH = {"question": "input", "answer": "target", "grader": "exact"}

PRESETS: dict[str, dict[str, Any]] = {
    "gsm8k": {"path": "openai/gsm8k", "name": "main", **_TEST},
    "math500": {"path": "nlile/hendrycks-MATH-benchmark", "test_path": "HuggingFaceH4/MATH-500", **_TEST, **_MATH},
    "aime24": {"test_path": "HuggingFaceH4/aime_2024", "test_subset": "train", **_AIME},
    "aime25": {"test_path": "math-ai/aime25", **_TEST, **_AIME},
    "mgsm": {"test_path": "juletxat/mgsm", **_TEST, **_MGSM},
    "aqua": {"path": "deepmind/aqua_rat", **_TEST, **_AQUA},
    "bbh": {"test_path": "lukaemon/bbh", **_TEST, **_BBH},
}
"""Name -> options of Table, where they differ from its defaults. `path` is the training data, if there are any."""


class Named:
    """A public task.

    Args:
        task: a name of PRESETS.
        path: a file or data set to read the training data from instead.
        test_path: the same for the test data.
        name: the part of it: a language for mgsm ("ja"), a task for bbh ("navigate").
        question, answer: columns, for files that name them otherwise.
        template: the prompt, with {question} where the question goes.
        grader: what tells right from wrong: "number", "choice", "exact" or "math".
        search_on_test: for a task without training data, search on a part of the public test set.
        search, reserve, held_out: number of problems of each split; default: all there are.
        seed: decides which problem falls in which split.

    Raises:
        ValueError: if the data cannot be read.
    """

    def __init__(
        self,
        task: str,
        *,
        path: str | None = None,
        test_path: str | None = None,
        name: str | None = None,
        question: str | None = None,
        answer: str | None = None,
        template: str | None = None,
        grader: str | None = None,
        search_on_test: bool = False,
        search: Size | None = None,
        reserve: Size | None = None,
        held_out: Size | None = None,
        seed: Seed = 0,
    ) -> None:
        preset = {"template": _BOXED, **PRESETS[task]}
        if path and not test_path and Path(path).is_file():  # one file: cut in three
            preset.pop("test_path", None)
            preset.pop("test_subset", None)
        if path or test_path:  # the user's files: plain columns
            preset = {k: v for k, v in preset.items() if k not in ("question", "answer", "options", "revision")}
        given = {
            "path": path, "test_path": test_path, "name": name, "question": question, "answer": answer,
            "template": template, "grader": grader, "seed": seed,
        }  # fmt: skip
        options = {**preset, **{key: value for key, value in given.items() if value is not None}}
        sizes: dict[str, Any] = {"search": search, "reserve": reserve, "held_out": held_out}
        self._task, self._held_out_only = task, False
        if "path" not in options:
            options["path"], options["subset"] = options.pop("test_path"), options.pop("test_subset", "test")
            if not search_on_test:
                self._held_out_only = True
                options.update(test_path=options["path"], test_subset=options["subset"])
        self._table = Table(**options, **sizes)
        self.prompt, self.grade = self._table.prompt, self._table.grade

    def problems(self, split: Split) -> list[Problem]:
        """See Task.

        Raises:
            ValueError: if a search is wanted on public test problems.
        """
        if self._held_out_only and split is not Split.HELD_OUT:
            raise ValueError(
                f"task {self._task!r} has no training problems, only a public test set, which is for held-out scores: "
                "search on another task (gsm8k, math500, aqua, arithmetic, or a mixture with one of them), or say "
                "search_on_test: true"
            )
        return self._table.problems(split)


def __getattr__(task: str) -> Any:
    """`fitness.tasks.named:gsm8k` and so on: Named with its first argument given."""
    if task not in PRESETS:
        raise AttributeError(task)
    found = partial(Named, task)
    found.__doc__ = f"The task {task}; see Named."
    return found
