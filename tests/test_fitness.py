"""Splits, graders, tasks, scores."""

import json
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitness.graders import final_number, grade, same_number, same_text
from fitness.objectives import losses
from fitness.splits import SHARES, split_of, take
from fitness.tasks.arithmetic import Arithmetic, is_for_training, solve, trace
from fitness.tasks.table import Table
from fitness.types import Completion, Finish, Problem, Score, Split, Verdict


class TestSplits:
    def test_every_question_has_one_split_in_the_stated_shares(self):
        found = [split_of(f"question {i}", seed=3) for i in range(20_000)]
        for split, share in SHARES.items():
            assert found.count(split) / len(found) == pytest.approx(share, abs=0.02)

    def test_more_data_moves_nothing(self):
        problems = [Problem(f"q{i}", str(i)) for i in range(300)]
        few, many = (take(p, Split.SEARCH, None, 0) for p in (problems[:100], problems))
        assert many[: len(few)] == few

    def test_duplicates_are_dropped(self):
        assert len(take([Problem("same", "1")] * 10, split_of("same", 0), None, 0)) == 1

    def test_too_few_says_how_many_there_are(self):
        with pytest.raises(ValueError, match=r"asked for 50 problems.*only \d+"):
            take([Problem(f"q{i}", "") for i in range(20)], Split.HELD_OUT, 50, 0)


class TestGraders:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("The answer is 42.", 42),
            ("... #### 1,234", 1234),
            ("first 3, then 7", 7),
            (r"so \boxed{12} and not 13", 12),
            (r"\boxed{1} then \boxed{\frac{1}{2}} no, \boxed{2}", 2),
            ("-4", -4),
            ("\u22124", -4),
            ("7-3", 3),  # a difference, not minus three
            ("3/4", Fraction(3, 4)),
            ("costs $1,000.50 in all", Fraction(2001, 2)),
            ("<think>99</think>5", 5),
            ("<think>1 2 3</think>", None),
            ("no number", None),
            ("", None),
            ("1/0", None),
            ("#### none", None),
            ("v2", None),
        ],
    )
    def test_final_number(self, text, expected):
        assert final_number(text) == expected

    def test_exact_equality_not_closeness(self):
        assert same_number("18", "18.0") is True
        assert same_number("18", "18.0001") is False

    def test_gsm8k_references_are_read(self):
        assert same_number("She has 48+24 = <<48+24=72>>72 clips.\n#### 72", "72") is True

    @given(st.text(max_size=300), st.text(max_size=30))
    def test_no_text_raises(self, text, reference):
        for grader in (same_number, same_text):
            assert grader(reference, text) in (True, False, None)

    @pytest.mark.parametrize("piece", ["9", "1,", "-", "\\boxed{", "1/", "#### "])
    def test_a_megabyte_takes_a_moment(self, piece):
        start = time.perf_counter()
        same_number("1", piece * (1_000_000 // len(piece)))
        assert time.perf_counter() - start < 5  # quadratic time would take hours

    def test_truncation_is_never_correct(self):
        cut = Completion("72", 10, 0, Finish.LENGTH)
        assert grade(same_number, "72", cut) is Verdict.TRUNCATED
        assert grade(same_number, "72", Completion("72", 10, 0, "length")) is Verdict.TRUNCATED  # plain text
        assert grade(same_number, "72", Completion("72", 10, 0, Finish.STOP)) is Verdict.CORRECT
        assert grade(same_number, "72", Completion("73", 10, 0, Finish.STOP)) is Verdict.WRONG
        assert grade(same_number, "72", Completion("...", 10, 0, Finish.STOP)) is Verdict.UNPARSABLE


class TestArithmetic:
    @given(st.integers(0, 99), st.lists(st.tuples(st.sampled_from("+-*"), st.integers(0, 9)), min_size=1, max_size=6))
    def test_solve_agrees_with_python(self, start, operations):
        expression = str(start)
        for symbol, digit in operations:
            expression = f"({expression}){symbol}{digit}"
        question = str(start) + "".join(f"{s}{d}" for s, d in operations)
        assert solve(question) == eval(expression) % 100

    def test_the_worked_instance(self):
        assert solve("11+2*3-9") == 30
        assert trace("11+2*3-9", "concise") == "11+2=13;13*3=39;39-9=30;"
        assert trace("11+2", "verbose") == "11+2=13?11+2=13?11+2=13ok;"

    def test_splits_are_disjoint_and_never_trained_on(self):
        task = Arithmetic(search=300, reserve=200, held_out=400)
        splits = {split: {p.question for p in task.problems(split)} for split in Split}
        assert [len(s) for s in splits.values()] == [300, 200, 400]
        assert len(set.union(*splits.values())) == 900
        assert not any(map(is_for_training, set.union(*splits.values())))

    def test_another_seed_is_another_set(self):
        first, second = (Arithmetic(seed=s).problems(Split.SEARCH) for s in (0, 1))
        assert first != second

    def test_large_splits_are_filled(self):
        assert len(Arithmetic(held_out=5000).problems(Split.HELD_OUT)) == 5000


class TestTable:
    @pytest.fixture
    def rows(self, tmp_path):
        file = tmp_path / "rows.jsonl"
        lines = [{"q": f"What is {i} + 1?", "a": f"It is so. #### {i + 1}"} for i in range(60)]
        file.write_text("\n".join(map(json.dumps, [*lines, lines[0], {"q": None, "a": "1"}])))
        return str(file)

    def test_reads_grades_and_prompts(self, rows):
        task = Table(path=rows, question="q", answer="a", template="Q: {question}\nA:")
        problems = [p for split in Split for p in task.problems(split)]
        assert len(problems) == 60  # the duplicate and the empty row are gone
        problem = next(p for p in problems if p.question == "What is 7 + 1?")
        assert task.prompt(problem) == "Q: What is 7 + 1?\nA:"
        assert task.grade(problem, Completion("8", 1, 0, Finish.STOP)) is Verdict.CORRECT

    def test_a_data_set_by_name_goes_through_datasets(self, rows, tmp_path):
        """A folder stands in for a hub name: the same call, without a network."""
        (tmp_path / "hub").mkdir()
        (tmp_path / "hub" / "train.jsonl").write_bytes(Path(rows).read_bytes())
        task = Table(path=str(tmp_path / "hub"), question="q", answer="a", subset="train")
        assert sum(len(task.problems(split)) for split in Split) == 60

    def test_a_missing_column_names_those_there_are(self, rows):
        with pytest.raises(ValueError, match="no column 'question'; it has q, a"):
            Table(path=rows)

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(ValueError, match="no such file"):
            Table(path=str(tmp_path / "no.jsonl"))

    @pytest.mark.parametrize("name", ["there.csv", "there.yaml", "nowhere.csv"])
    def test_a_file_of_another_kind_is_not_looked_for_on_the_hub(self, tmp_path, name):
        for there in ("there.csv", "there.yaml"):
            (tmp_path / there).write_text("question,answer")
        with pytest.raises(ValueError, match=r"expected a .jsonl, .json or .parquet file, or the name of a data set"):
            Table(path=str(tmp_path / name))

    def test_a_hub_name_without_a_network(self):
        with pytest.raises(ValueError, match="cannot read data set 'nobody/nothing'"):
            Table(path="nobody/nothing")

    def test_a_broken_file(self, tmp_path):
        (tmp_path / "x.jsonl").write_text("{not json")
        with pytest.raises(ValueError, match="cannot read"):
            Table(path=str(tmp_path / "x.jsonl"))


class TestScore:
    SCORE = Score(
        problem_ids=("a", "b", "c"),
        verdicts=np.array([[0, 0], [0, 1], [3, 2]], np.uint8),
        n_tokens=np.array([[10, 20], [30, 40], [100, 5]], np.int32),
        n_think_tokens=np.array([[5, 5], [5, 5], [5, 5]], np.int32),
    )

    def test_by_hand(self):
        s = self.SCORE
        assert s.accuracy == pytest.approx(3 / 6)
        assert s.truncated == pytest.approx(1 / 6)
        assert s.tokens_mean == pytest.approx(205 / 6)
        # Clustered by problem: means 1, 0.5, 0 have standard deviation 0.5, over sqrt(3).
        assert s.accuracy_stderr == pytest.approx(0.5 / 3**0.5)
        summary = s.summary()
        assert summary["tokens_median"] == 25
        assert summary["tokens_correct_mean"] == pytest.approx(20)
        assert summary["unparsable"] == pytest.approx(1 / 6)
        assert losses(s, ("tokens", "error")).tolist() == pytest.approx([205 / 6, 0.5])

    def test_one_sample_is_the_binomial_error(self):
        verdicts = np.array([[0]] * 30 + [[1]] * 70, np.uint8)
        ones = np.ones((100, 1), np.int32)
        score = Score(tuple(map(str, range(100))), verdicts, ones, ones)
        assert score.accuracy_stderr == pytest.approx((0.3 * 0.7 / 99) ** 0.5)

    def test_nothing_correct_is_no_error(self):
        ones = np.ones((4, 1), np.int32)
        summary = Score(tuple("abcd"), np.ones((4, 1), np.uint8), ones, ones).summary()
        assert summary["accuracy"] == 0 and summary["tokens_correct_p90"] is None
