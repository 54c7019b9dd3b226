"""Named tasks, tables with a test set, mixtures and reasoning-gym."""

import importlib.util
import json
import pkgutil
import sys
from pathlib import Path

import pytest

from evo.components import component_options
from evo.config import TaskConfig
from fitness import apart
from fitness.splits import split_of
from fitness.tasks import TASKS, reasoning_gym
from fitness.tasks.mixture import Mixture, shares
from fitness.tasks.named import PRESETS
from fitness.tasks.table import Table
from fitness.types import Completion, Finish, Split, Verdict
from tests.conftest import DATA

SELECTED = (Split.SEARCH, Split.RESERVE)


def write(path, rows):
    path.write_text("\n".join(json.dumps({"question": q, "answer": a}) for q, a in rows))
    return str(path)


def make(kind, **options):
    return pkgutil.resolve_name(TASKS[kind])(**component_options(TaskConfig(kind=kind, **options)))


def done(text):
    return Completion(text, 1, 0, Finish.STOP)


@pytest.fixture
def files(tmp_path):
    train = write(tmp_path / "train.jsonl", [(f"train {i}", i) for i in range(90)] + [("shared", 1), ("train 3", 3)])
    test = write(tmp_path / "test.jsonl", [(f"test {i}", i) for i in range(30)] + [("shared", 1)])
    return {"path": train, "test_path": test}


def questions(task, split):
    return {problem.question for problem in task.problems(split)}


def test_train_is_searched_on_and_test_held_out(files):
    task = make("gsm8k", **files)
    assert questions(task, Split.HELD_OUT) == {f"test {i}" for i in range(30)} | {"shared"}
    search, reserve = (questions(task, split) for split in SELECTED)
    assert search | reserve == {f"train {i}" for i in range(90)} and not search & reserve
    assert 45 < len(search) < 75  # two thirds


def test_a_problem_stays_in_its_split_whatever_is_added(files, tmp_path):
    before = make("gsm8k", **files)
    more = write(tmp_path / "more.jsonl", [(f"new {i}", i) for i in range(50)] + [(f"train {i}", i) for i in range(90)])
    after = make("gsm8k", path=more, test_path=files["test_path"])
    for split in SELECTED:
        assert questions(before, split) <= questions(after, split)


@pytest.mark.parametrize("kind", [name for name, preset in PRESETS.items() if "path" not in preset])
def test_a_public_test_set_is_held_out_unless_the_user_insists(kind, files):
    task = make(kind, test_path=files["test_path"])
    assert len(task.problems(Split.HELD_OUT)) == 31
    for split in SELECTED:
        with pytest.raises(ValueError, match="search_on_test: true"):
            task.problems(split)
    task = make(kind, test_path=files["test_path"], search_on_test=True)
    parts = [questions(task, split) for split in Split]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 31


def test_one_file_is_cut_in_three(files):
    task = make("gsm8k", path=files["path"])
    assert sum(len(questions(task, split)) for split in Split) == 91  # the duplicate is gone


@pytest.mark.parametrize("kind", PRESETS)
def test_presets_are_options_of_table_and_need_a_network_or_a_file(kind):
    with pytest.raises(ValueError, match=r"cannot read data set .*Without a network, give a file|pip install"):
        make(kind)


def test_options_parquet_and_empty_rows(tmp_path):
    import datasets

    rows = {"q": ["Which?", " ", "What?"], "o": [["A)1", "B)2"], [], []], "a": ["B", "A", ""]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "x.parquet")
    task = Table(path=str(tmp_path / "x.parquet"), question="q", answer="a", options="o", grader="choice")
    (problem,) = [p for split in Split for p in task.problems(split)]
    assert problem.question == "Which?\nA)1\nB)2"
    assert task.grade(problem, done("The answer is B")) is Verdict.CORRECT
    assert task.grade(problem, done("")) is Verdict.UNPARSABLE
    with pytest.raises(ValueError, match="no row with both"):
        Table(path=write(tmp_path / "none.jsonl", [("q", "")]))


class TestMixture:
    def test_shares_are_in_proportion(self):
        assert shares([1, 1, 2], 8) == [2, 2, 4]
        assert shares([1, 1, 1], 10) in ([4, 3, 3], [3, 4, 3], [3, 3, 4])
        assert sum(shares([0.3, 0.1, 5.7], 97)) == 97

    def test_each_part_prompts_and_grades_its_own(self, files):
        parts = [{"kind": "gsm8k", **files, "weight": 3}, {"kind": "arithmetic"}]
        task = Mixture(tasks=parts, search=40, reserve=20, held_out=20)
        found = {split: task.problems(split) for split in Split}
        assert [len(found[split]) for split in (Split.SEARCH, Split.RESERVE, Split.HELD_OUT)] == [40, 20, 20]
        assert sum(p.question.startswith("train") for p in found[Split.SEARCH]) == 30
        ours, theirs = (
            next(p for p in found[Split.SEARCH] if p.question.startswith("train") is is_table)
            for is_table in (True, False)
        )
        assert "boxed" in task.prompt(ours) and task.prompt(theirs) == theirs.question
        assert task.grade(ours, done(f"\\boxed{{{ours.answer}}}")) is Verdict.CORRECT

    def test_a_question_of_two_parts_is_in_one_split(self, files):
        both = [{"kind": "gsm8k", **files}, {"kind": "aime25", "test_path": files["path"], "search_on_test": True}]
        task = Mixture(tasks=both, search=20, reserve=10, held_out=20)
        parts = [questions(task, split) for split in Split]
        assert sum(map(len, parts)) == len(set.union(*parts))

    def test_a_test_set_counts_in_held_out_alone(self, files):
        parts = [{"kind": "arithmetic"}, {"kind": "aime25", "test_path": files["test_path"]}]
        task = Mixture(tasks=parts, search=10, reserve=10, held_out=20)
        assert not any(q.startswith("test") for split in SELECTED for q in questions(task, split))
        assert sum(q.startswith("test") for q in questions(task, Split.HELD_OUT)) == 10

    @pytest.mark.parametrize(
        ("tasks", "message"),
        [
            ([], "at least one"),
            ([{"kind": "gsm9k"}], "expected a kind of arithmetic"),
            ([{"kind": "arithmetic", "seeds": 3}], "'arithmetic' has no option 'seeds'"),
            ([{"kind": "arithmetic", "weight": 0}], "weights above 0"),
            ([{"kind": "gsm8k"}, {"kind": "mixture", "tasks": []}], r"^tasks\.1\.kind: expected a task of its own"),
            ([{"kind": "arithmetic", "search": 5}], r"^tasks\.0\.search: a mixture shares out its problems by weight"),
            ([{"kind": "aime25", "test_path": "x.jsonl"}], "no such file"),
        ],
    )
    def test_mistakes(self, tasks, message):
        with pytest.raises(ValueError, match=message):
            Mixture(tasks=tasks)


STAND_IN = """
import time

class Family(list):
    def score_answer(self, answer, entry):
        if answer == "hang":
            time.sleep(1000)
        if answer == "raise":
            raise ZeroDivisionError
        return 1.0 if answer == entry["answer"] and entry["made"] == ("tuple",) else 0.5

def create_dataset(family, seed, size, **parameters):
    if family != "sums":
        raise ValueError("unknown")
    top = parameters["top"]
    numbers = ((i + seed) % top for i in range(size))
    return Family({"question": f"{n} + 1", "answer": str(n + 1), "made": ("tuple",)} for n in numbers)
"""


class TestReasoningGym:
    def test_without_the_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "reasoning_gym", None)
        with pytest.raises(ValueError, match=r"mergefront\[reasoning-gym\]"):
            make("reasoning_gym", family="chain_sum")

    @pytest.fixture
    def stand_in(self, tmp_path, monkeypatch):
        (tmp_path / "reasoning_gym.py").write_text(STAND_IN)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(apart.__file__).parent.parent}")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "reasoning_gym", raising=False)
        monkeypatch.setattr(apart, "SECONDS", 0.5)
        reasoning_gym._apart.end()
        yield
        reasoning_gym._apart.end()
        sys.modules.pop("reasoning_gym", None)

    @pytest.mark.usefixtures("stand_in")
    def test_with_a_stand_in(self):
        task = make("reasoning_gym", family="sums", difficulty={"top": 500}, search=50, reserve=20, held_out=60)
        assert [len(task.problems(split)) for split in Split] == [50, 20, 60]
        problem = task.problems(Split.SEARCH)[0]
        for text, verdict in {
            f"<answer>{problem.answer}</answer>": Verdict.CORRECT, problem.answer: Verdict.CORRECT,
            "7777": Verdict.WRONG, "raise": Verdict.WRONG, "": Verdict.UNPARSABLE, "hang": Verdict.TIMEOUT,
            f" {problem.answer} ": Verdict.CORRECT,
        }.items():  # fmt: skip
            assert task.grade(problem, done(text)) is verdict
        with pytest.raises(ValueError, match="family 'sum'"):
            make("reasoning_gym", family="sum")

    @pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="the extra is not installed")
    def test_the_real_one(self):
        task = make("reasoning_gym", family="chain_sum", search=20, reserve=5, held_out=5)
        problem = task.problems(Split.SEARCH)[0]
        assert task.grade(problem, done(f"<think>1</think><answer>{problem.answer}</answer>")) is Verdict.CORRECT


REAL = {
    "gsm8k": {"path": "gsm8k_train", "test_path": "gsm8k_test"}, "mgsm": {"test_path": "mgsm_ja"},
    "aqua": {"path": "aqua_test", "grader": "choice"}, "bbh": {"test_path": "bbh_navigate"},
}  # fmt: skip


@pytest.mark.parametrize("kind", REAL)
def test_real_data(kind):
    options = {k: str(DATA / f"{v}.jsonl") if k.endswith("path") else v for k, v in REAL[kind].items()}
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}")
    task = make(kind, **options)
    held_out = task.problems(Split.HELD_OUT)
    assert len(held_out) >= 80
    for problem in held_out:
        assert task.grade(problem, done(f"I think so. \\boxed{{{problem.answer}}}")) is Verdict.CORRECT
    if kind == "gsm8k":
        assert len(held_out) == 1319
        assert not questions(task, Split.SEARCH) & questions(task, Split.HELD_OUT)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "abc", None])
def test_a_weight_that_is_none(weight):
    with pytest.raises(ValueError, match=r"tasks\.0\.weight: expected weights above 0, got"):
        Mixture(tasks=[{"kind": "arithmetic", "weight": weight}])


def test_parts_that_share_their_questions_are_told(tmp_path):
    path = write(tmp_path / "all.jsonl", [(f"question {i}", i) for i in range(90)])
    parts = [{"kind": "table", "path": path, "seed": seed} for seed in (1, 1, 1)]
    with pytest.raises(ValueError, match=r"'table' has to give 20 problems for the split 'held_out', and has too few"):
        Mixture(tasks=parts, search=20, reserve=10, held_out=60)


def test_weights_hold_where_parts_share_questions(tmp_path):
    path = write(tmp_path / "all.jsonl", [(f"question {i}", i) for i in range(400)])
    parts = [{"kind": "table", "path": path, "seed": seed} for seed in (0, 1)]
    task = Mixture(tasks=[*parts, {"kind": "arithmetic", "weight": 2}], search=80, reserve=20, held_out=80)
    found = {split: task.problems(split) for split in Split}
    for split, n in ((Split.SEARCH, 80), (Split.RESERVE, 20), (Split.HELD_OUT, 80)):
        of_table = [problem for problem in found[split] if problem.question.startswith("question")]
        assert (len(found[split]), len(of_table)) == (n, n // 2)
    assert len({problem.id for problems in found.values() for problem in problems}) == 180


def test_answers_that_their_grader_cannot_read(tmp_path):
    path = write(tmp_path / "words.jsonl", [(f"question {i}", "yes") for i in range(20)])
    for grader in ("number", "choice"):
        with pytest.raises(ValueError, match=rf"grader: '{grader}' cannot read 20 of the 20 answers in .*'yes'"):
            Table(path=path, grader=grader)
    assert Table(path=path, grader="exact", search=5).problems(Split.SEARCH)
    good = write(tmp_path / "good.jsonl", [(f"problem {i}", i) for i in range(20)])
    with pytest.raises(ValueError, match=r"cannot read 20 of the 20 answers in .*words\.jsonl"):
        Table(path=good, test_path=path)


def test_data_that_leaves_nothing_for_a_split(tmp_path):
    path = write(tmp_path / "one.jsonl", [("only", 1)])
    emptied = next(split for split in SELECTED if split_of("only", 0) is not split)
    with pytest.raises(ValueError, match=rf"'{emptied}' was asked for 1 .* leaves only 0 .*: give more data$"):
        Table(path=path, **{str(emptied): 1}).problems(emptied)


def test_an_empty_file(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty.jsonl is empty"):
        Table(path=str(tmp_path / "empty.jsonl"))
