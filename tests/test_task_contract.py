"""One contract for every task of the table, and what is said of a task that breaks it."""

import json
import pkgutil

import numpy as np
import pytest

from evo.components import component_options
from evo.config import TaskConfig
from evo.scoring import score_checkpoint
from evo.search import Search
from fitness.evaluator import Evaluator
from fitness.splits import problems_of, take
from fitness.tasks import TASKS
from fitness.types import Completion, Finish, Problem, Split, Verdict
from tests.conftest import CHIMERA
from tests.searching import write_config

LETTERS = "ABCDE"
OPTIONS = {  # what a task needs besides a seed; "FILE" is one with a column of numbers, "LETTERS" one with letters
    "table": {"path": "FILE"},
    "mixture": {"tasks": [{"kind": "arithmetic"}, {"kind": "table", "path": "FILE"}], "search": 20, "reserve": 10},
    "reasoning_gym": {"family": "chain_sum"},
    "gsm8k": {"path": "FILE"},
    "math500": {"path": "FILE"},
    "aqua": {"path": "LETTERS"},
    **{name: {"test_path": "FILE", "search_on_test": True} for name in ("aime24", "aime25", "mgsm", "bbh")},
}


@pytest.fixture
def files(tmp_path):
    """Tables by the names that OPTIONS has for them."""
    answers = {"FILE": [str(i) for i in range(90)], "LETTERS": [LETTERS[i % 5] for i in range(90)]}
    for name, column in answers.items():
        rows = [{"question": f"question {i}", "answer": answer} for i, answer in enumerate(column)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {name: str(tmp_path / f"{name}.jsonl") for name in answers}


def build(kind, files, seed):
    """A task of the table; skips where a package is missing that it needs."""
    parts = [{**part, "seed": seed} for part in OPTIONS.get(kind, {}).get("tasks", [])]
    options = {**OPTIONS.get(kind, {}), **({"tasks": parts, "held_out": 20} if parts else {"seed": seed})}
    text = json.dumps(options)
    for name, path in files.items():
        text = text.replace(json.dumps(name), json.dumps(path))
    try:
        return pkgutil.resolve_name(TASKS[kind])(**component_options(TaskConfig(kind=kind, **json.loads(text))))
    except ValueError as error:
        if "pip install" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("kind", TASKS)
class TestContract:
    def test_problems_are_the_same_for_a_seed_and_in_no_two_splits(self, kind, files):
        splits = [build(kind, files, 3).problems(split) for split in Split]
        again, other = ([build(kind, files, seed).problems(split) for split in Split] for seed in (3, 4))
        assert splits == again and splits != other
        ids = [problem.id for problems in splits for problem in problems]
        assert all(splits) and len(set(ids)) == len(ids)

    def test_prompts_are_text_and_the_reference_answer_is_right(self, kind, files):
        task = build(kind, files, 0)
        for problem in (problem for split in Split for problem in task.problems(split)[:10]):
            assert isinstance(task.prompt(problem), str) and task.prompt(problem)
            said = {text: Completion(text, 9, 0, Finish.STOP) for text in (problem.answer, "zzz", "")}
            assert task.grade(problem, said[problem.answer]) is Verdict.CORRECT
            for nonsense in ("zzz", ""):
                assert task.grade(problem, said[nonsense]) in (Verdict.WRONG, Verdict.UNPARSABLE)
            assert task.grade(problem, Completion(problem.answer, 9, 0, Finish.LENGTH)) is Verdict.TRUNCATED


class Sums:
    """A task that keeps the contract, with cracks."""

    problems_in = staticmethod(lambda split: take([Problem(f"{i}+1", str(i + 1)) for i in range(50)], split, None, 0))
    prompt = staticmethod(lambda problem: problem.question)
    grade = staticmethod(lambda problem, completion: Verdict.WRONG)

    def problems(self, split: Split) -> list[Problem]:
        """See Task."""
        return self.problems_in(split)


ALIKE = [Problem("1+1", "2"), Problem("2+1", "3")]
CRACKS = {
    "shared": ({"problems_in": lambda split: ALIKE}, r"'reserve': expected each question once, got '1\+1',"),
    "twice": ({"problems_in": lambda split: ALIKE[:1] * 2}, "'search': expected each question once"),
    "none": ({"problems_in": lambda split: []}, "'search': expected at least one problem, got none"),
    "nothing": ({"problems_in": lambda split: None}, "'search': expected a list of Problem, got NoneType"),
    "tuples": ({"problems_in": lambda split: [("1+1", "2")]}, r"objects of fitness.types.Problem, got \('1\+1', '2'\)"),
    "numbers": ({"problems_in": lambda split: [Problem("1+1", 2)]}, "expected text as question and as answer, got"),
    "prompt": ({"prompt": lambda problem: None}, "'search': expected text as prompt of .*, got None"),
}


@pytest.fixture(params=CRACKS)
def cracked(request, monkeypatch):
    """Puts a task that is broken in one way into the table; what is said of it."""
    changes, said = CRACKS[request.param]
    broken = type("Broken", (Sums,), {name: staticmethod(change) for name, change in changes.items()})
    monkeypatch.setattr("tests.broken", broken, raising=False)
    monkeypatch.setitem(TASKS, "broken", "tests:broken")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    return rf"task 'broken', split .*{said}"


def test_a_broken_task_is_refused_before_a_model_is_loaded(cracked, tmp_path):
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace("kind: arithmetic, search: 24, reserve: 8, held_out: 40", "kind: broken"))
    with pytest.raises(ValueError, match=cracked):
        Search.from_yaml(path, tmp_path / "run").run()
    assert not (tmp_path / "run" / "ledger.sqlite").exists()
    if "'reserve'" not in cracked:  # only one split is asked for here
        with pytest.raises(ValueError, match=cracked.replace("search", "held_out")):
            score_checkpoint(CHIMERA / "concise", [{"kind": "broken"}], {"device": "cpu"})


def test_the_reserve_may_be_empty_where_nothing_is_scored_on_it():
    task = Sums()
    task.problems_in = lambda split: [] if split is Split.RESERVE else Sums.problems_in(split)
    assert set(problems_of(task, "sums")) == set(Split)
    with pytest.raises(ValueError, match="split 'reserve': expected at least one problem"):
        problems_of(task, "sums", [Split.RESERVE])


@pytest.mark.parametrize("grade", [True, 0.5, None, np.uint8(0)])
def test_a_grade_that_is_no_verdict(grade):
    class Engine:
        def generate(self, prompts, **options):
            return [Completion("2", 1, 0, Finish.STOP)] * len(prompts)

    task = Sums()
    task.grade = lambda problem, completion: grade
    with pytest.raises(ValueError, match=r"Sums.grade: expected a Verdict, such as Verdict.CORRECT, got "):
        Evaluator(Engine(), task, max_tokens=5).evaluate(ALIKE)
