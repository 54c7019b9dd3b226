"""Graders on worked answers, on hostile text, and on real reference answers."""

import json
import time
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitness import math_verify
from fitness.graders import GRADERS, final_choice, final_number, get_grader, grade, same_choice, same_number, same_text
from fitness.types import Completion, Finish, Verdict
from tests.conftest import DATA

needs_math_verify = pytest.mark.skipif(find_spec("math_verify") is None, reason="the extra `math` is not installed")
CHEAP = [same_number, same_choice, same_text]
NASTY = st.one_of(
    st.text(),
    st.text(alphabet="0123456789.,/-+()ABCDE \n"),
    st.lists(
        st.sampled_from(
            ["\\boxed{", "}", "{", "####", "\\frac{1}{0}", "\\frac", "answer is", "Answer:", "<think>", "</think>",
             "(A)", "-", "1/0", "1,2,3", "\x00", "½", "٣", "9" * 500]
        ),
        max_size=30,
    ).map(" ".join),
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so \\boxed{\\frac{3}{4}}", Fraction(3, 4)),
        ("\\boxed{-\\dfrac{1}{2}}", Fraction(-1, 2)),
        ("\\boxed{3\\frac12}", Fraction(7, 2)),
        ("\\boxed{\\text{about } 1{,}234{,}567}", Fraction(1234567)),
        ("\\boxed{10\\,000}", Fraction(10000)),
        ("\\boxed{\\$18.50}", Fraction(37, 2)),
        ("first \\boxed{1}, no: \\boxed{2}", Fraction(2)),
        ("\\boxed{5} is the answer, 17 sheep later", Fraction(5)),
        ("#### 1,000 apples", Fraction(1000)),
        ("答えは−3です", Fraction(-3)),
        ("x = 3⁄4", Fraction(3, 4)),
        ("7-3", Fraction(3)),
        ("<think>99</think>100", Fraction(100)),
        ("<think>it is 99", None),
        ("none", None),
        ("1/0", None),
        ("\\boxed{}", None),
        ("5 \\boxed{x}", None),
        (".5", Fraction(1, 2)),
        ("\\boxed{.5}", Fraction(1, 2)),
        ("\\boxed{-.25}", Fraction(-1, 4)),
        ("\\boxed{\\$.50}", Fraction(1, 2)),
        ("The answer is ...18", Fraction(18)),
        ("Rs.18", Fraction(18)),
        ("__18__", Fraction(18)),
        ("_18_", Fraction(18)),
        ("18 = x_1", Fraction(18)),
        ("version 1.2.3", Fraction(6, 5)),
        ("-$5", Fraction(-5)),
        ("\\boxed{-\\$5}", Fraction(-5)),
        ("$5-$3", Fraction(3)),
        ("20 - $5", Fraction(5)),
        ("\\boxed{12 \\text{ cm}^3}", Fraction(12)),
        ("\\boxed{5 \\text{ m}^2}", Fraction(5)),
        ("\\boxed{5\\,\\mathrm{m}^{2}}", Fraction(5)),
        ("an area of 5 m^2", Fraction(5)),
        ("1\u00a0000", Fraction(1000)),
        ("1\u202f234\u202f567.5", Fraction(2469135, 2)),
        ("10\\ 000", Fraction(10000)),
        ("10,\\!000", Fraction(10000)),
        ("there are 3 100 gram bags", Fraction(100)),
        ("7\u00a050", Fraction(50)),
        ("\\boxed{1 / 2}", Fraction(1, 2)),
        ("1/1,000", Fraction(1, 1000)),
        ("\\boxed{3 1/2}", Fraction(7, 2)),
        ("\\boxed{-3 1/2}", Fraction(-7, 2)),
        ("\\boxed{-3 \\frac{1}{2}}", Fraction(-7, 2)),
        ("\\boxed{3\\,\\frac{1}{2}}", Fraction(7, 2)),
        ("\\boxed{1.5/2}", Fraction(3, 4)),
        ("\\boxed{\\frac{1}{-2}}", Fraction(-1, 2)),
        ("\\boxed{\\frac{1.5}{2}}", Fraction(3, 4)),
        ("\\boxed{\\frac{1{,}000}{3}}", Fraction(1000, 3)),
        ("\\boxed{\\frac1{2}}", Fraction(1, 2)),
        ("\\boxed{\\frac{1}2}", Fraction(1, 2)),
        ("\\boxed{\\frac 1 2}", Fraction(1, 2)),
        ("\\frac{1}{2}\\frac{3}{4}", Fraction(3, 4)),
        ("\\boxed{18} and 17 more, which \\boxed{}", Fraction(18)),
        ("\\boxed{18} \\fbox{ }", Fraction(18)),
        ("#### Step 1: buy 3 apples\nSo 18.\n\nThe answer is 18.", Fraction(18)),
        ("#### 1. Buy 3 apples\nSo 18.", Fraction(18)),
        ("#### **2) Buy 3 apples**\nSo 18.", Fraction(18)),
        ("#### Answer\n18", Fraction(18)),
        ("#### 18\n#### Note\nsold by 6", Fraction(18)),
        ("#### **$18.**\n6 each", Fraction(18)),
        ("#### \\$18\n6 each", Fraction(18)),
        ("#### -$18\n6 each", Fraction(-18)),
        ("#### \\frac{1}{2}\n6 each", Fraction(1, 2)),
    ],
)
def test_numbers(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (C).", "C"),
        ("Answer: B", "B"),
        ("**Answer:** D) 12 km", "D"),
        ("so \\boxed{\\text{(E)}}", "E"),
        ("\\boxed{A, B}", None),
        ("Options: (A) 1 (B) 2. I take (B)", "B"),
        ("B", "B"),
        ("(B).", "B"),
        ("A train leaves", None),
        ("The answer is a large number", None),
        ("It can't be the answer A's brother", None),
        ("The answer is B. Option C is wrong because it is too large.", "B"),
        ("The answer is (B).\nOption A: no\nOption C: no", "B"),
        ("Option B it is", "B"),
        ("The answer is option B. Option C is too large.", "B"),
        ("**Answer**: choice (B)\n(C) is too large.", "B"),
        ("b", "B"),
        ("(b)", "B"),
        ("b.", "B"),
        ("(B) 36", "B"),
        ("\\boxed{b}", "B"),
        ("Answer: b", "B"),
        ("Answer: (b) 36", "B"),
        ("The answer is b. Option C is wrong.", "B"),
        ("The answer is a.", "A"),
        ("the answer is a number", None),
        ("the answer is a, by luck, B", None),
        ("the answer's b", None),
        ("two answers.", None),
        ("the answer is e.g. 5", None),
        ("a train", None),
        ("\\boxed{(B) 36}", "B"),
        ("\\boxed{B. 36}", "B"),
        ("\\boxed{B) 36}", "B"),
        ("\\boxed{\\mathrm{B}}", "B"),
        ("\\boxed{\\textbf{(B)}\\ 36}", "B"),
        ("\\boxed{(A), (B)}", None),
        ("\\boxed{(A) or (B)}", None),
        ("\\boxed{36}", None),
        ("#### (B) 36", "B"),
        ("#### B", "B"),
        ("#### Step 1: compare\nThe answer is B.", "B"),
        ("", None),
    ],
)
def test_choices(text, letter):
    assert final_choice(text) == letter
    if letter:
        for reference in (letter, f"({letter})", letter.lower()):
            assert same_choice(reference, text) is True
        assert same_choice("Z", text) is False


@pytest.mark.parametrize(
    ("reference", "text", "same"),
    [
        ("False", "not True is False, so the answer is False.", True),
        ("False", "True and\nfalse", True),
        ("syndrome therefrom", "syndrome therefrom", True),
        ("syndrome therefrom", "therefrom syndrome therefrom", False),
        ("No", "\\boxed{Yes} or No", False),
        ("No", "", None),
        ("No", "<think>No</think>  ", None),
        ("a b", "Answer: a b", True),
        ("No", "The answer is **No**.", True),
        ("No", "The answer is 'No'.", True),
        ("No", 'The answer is "No."', True),
        ("No", "The answer is \u201cNo\u201d.", True),
        ("No", "The answer is:\n\nNo", True),
        ("No", "The answer is:\n\nYes", False),
        ("False", "Answer:\nFalse", True),
        ("No", "**Answer**: No", True),
        ("No", "**Final Answer:**\n\n**No**", True),
        ("No", "The answer is:\n$$\nNo\n$$", True),
        ("No", "The answer is $\\text{No}$.", True),
        ("No", "The answer is:", False),
        ("No", "The answer isn't clear.\nNo", True),
        ("No", "The answer is Yes.\nThe answer is No.", True),
        ("No", "#### Step 1: walk\nThe answer is No.", True),
        ("No", "#### The answer is No", True),
        ("No", "#### Final Answer\nNo", True),
        ("No", "#### No\n\nYes, surely", True),
        ("No", "\\boxed{\\text{No.}} \\boxed{}", True),
        ("No", "\\boxed{\\textbf{No}}", True),
        ("No", "\\boxed{\\mathrm{No}}", True),
        ("(A)", "\\boxed{A}", True),
        ("(A)", "\\boxed{\\text{(A)}}", True),
        ("(A)", "The answer is **A**.", True),
        ("(A)", "\\boxed{B}", False),
        ("(a b)", "\\boxed{a b}", False),
        ("] )", "]", False),
        (".5", "5", False),
    ],
)
def test_texts(reference, text, same):
    assert same_text(reference, text) is same


@given(NASTY, NASTY)
@settings(max_examples=300)
def test_no_grader_raises(reference, text):
    for grader in CHEAP:
        assert grader(reference, text) in (True, False, None)


@given(st.integers(-999, 999), NASTY, st.integers(-999, 999))
def test_more_text_never_helps(answer, junk, wrong):
    """A final wrong answer stays wrong, whatever stands before it."""
    if answer != wrong:
        assert same_number(str(answer), f"{junk} {answer} </think> \\boxed{{{wrong}}}") is False


@given(st.text(alphabet="ABCDE ()", max_size=40))
def test_listing_all_letters_is_one_guess(text):
    assert sum(same_choice(letter, text) is True for letter in "ABCDE") <= 1


@pytest.mark.parametrize("hostile", [
    "1" * 10**6, "1," * 5 * 10**5, "1/" * 5 * 10**5, "\\boxed{" * 10**5, "{" * 10**6, "-" * 10**6, "(A" * 5 * 10**5,
    "answer" * 10**5, "answer is" + " " * 10**6, "#" * 10**6, "\n" * 10**6, "\\frac{" * 10**5, "\\frac " * 10**5,
    "1" * 20 + "\\frac{" + "1" * 10**6, "<think>" * 10**5, "." * 10**6, "0." * 5 * 10**5, "answer " * 10**5,
    "\\boxed{" + "(" * 90_000 + "}", "1\u00a0111" * 10**5, "1 1/" * 10**5, "answer is a" + "." * 90_000 + "b",
])  # fmt: skip
def test_a_megabyte_takes_no_time_and_earns_nothing(hostile):
    start = time.process_time()
    for grader in CHEAP:
        assert not grader("42", hostile)
        assert not grader("A", hostile)
    assert time.process_time() - start < 5.0  # seconds here would be hours if it were quadratic


def test_timeouts_are_a_verdict_of_their_own():
    def slow(reference, text):
        raise TimeoutError

    assert grade(slow, "1", Completion("1", 1, 0, Finish.STOP)) is Verdict.TIMEOUT
    assert grade(slow, "1", Completion("1", 1, 0, Finish.LENGTH)) is Verdict.TRUNCATED
    assert [int(v) for v in Verdict] == [0, 1, 2, 3, 4]


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'mergefront\[math\]'"):
        get_grader("math")
    with pytest.raises(ValueError, match="expected one of number, choice"):
        get_grader("numbr")
    assert all(get_grader(name) for name in GRADERS if name != "math")


class TestProcess:
    """The process around math-verify, with a stand-in for math-verify."""

    @pytest.fixture(autouse=True)
    def stand_in(self, tmp_path, monkeypatch):
        (tmp_path / "math_verify.py").write_text(
            "import time, os\n"
            "def parse(text, **kw):\n"
            "    if 'hang' in text: time.sleep(1000)\n"
            "    if 'die' in text: os._exit(1)\n"
            "    if 'raise' in text: raise RecursionError\n"
            "    return text.strip('$')\n"
            "def verify(a, b, **kw): return a == b\n"
        )
        root = str(Path(math_verify.__file__).parent.parent)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")
        monkeypatch.setattr(math_verify, "SECONDS", 0.5)
        math_verify._process.end()
        yield
        math_verify._process.end()

    def test_it_survives_what_hangs_dies_and_raises(self):
        same = math_verify.same_expression
        assert same("x+1", "x+1") is True
        assert same("x+1", "x+2") is False
        assert same("x", "raise") is None
        assert same("x", "") is None
        for bad in ("hang", "die"):
            with pytest.raises(TimeoutError):
                same("x", bad)
            assert same("x", "x") is True
        assert grade(same, "x", Completion("hang", 1, 0, Finish.STOP)) is Verdict.TIMEOUT

    def test_one_that_does_not_start_is_no_answers_fault(self, tmp_path):
        (tmp_path / "math_verify.py").write_text("raise ImportError('no sympy')\n")
        with pytest.raises(RuntimeError, match=r"did not start.*pip install 'mergefront\[math\]'"):
            grade(math_verify.same_expression, "x", Completion("x", 1, 0, Finish.STOP))


@needs_math_verify
@pytest.mark.parametrize(
    ("reference", "text", "same"),
    [
        ("\\frac{\\sqrt{2}}{2}", "It is $\\boxed{\\frac{1}{\\sqrt{2}}}$", True),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "so $\\boxed{(3, \\pi/2)}$", True),
        ("x^2+2x+1", "$\\boxed{(x+1)^2}$", True),
        ("2", "$\\boxed{3}$", False),
        ("2", "\\boxed{" + "9" * 10**6 + "}", False),
    ],
)
def test_math_verify(reference, text, same):
    assert bool(math_verify.same_expression(reference, text)) is same


@pytest.mark.parametrize(("file", "grader"), [
    ("gsm8k_test", same_number), ("gsm8k_train", same_number), ("mgsm_ja", same_number),
    ("bbh_object_counting", same_number), ("bbh_multistep_arithmetic_two", same_number), ("aqua_test", same_choice),
    ("bbh_logical_deduction_three_objects", same_choice), ("bbh_navigate", same_text), ("bbh_word_sorting", same_text),
    ("bbh_boolean_expressions", same_text),
])  # fmt: skip
def test_every_real_answer_is_right_in_many_dresses_and_the_next_one_is_not(file, grader):
    path = DATA / f"{file}.jsonl"
    if not path.is_file():
        pytest.skip(f"no real data at {path}")
    rows = [json.loads(line) for line in path.open()]
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        dresses = [f"\\boxed{{{row['answer']}}}", f"#### {row['answer']}", f"<think>9 (Q)</think>{row['answer']}"]
        for text in dresses:
            assert grader(row["answer"], text) is True, (row["answer"], text)
        if grader is same_text:
            for text in (f"The answer is **{row['answer']}**.", f'Answer:\n\n"{row["answer"]}."'):
                assert grader(row["answer"], text) is True, (row["answer"], text)
                assert grader(other["answer"], text) is (row["answer"] == other["answer"]), (other["answer"], text)
        if row["answer"].casefold() != other["answer"].casefold() and not str(other["answer"]).endswith(row["answer"]):
            assert grader(row["answer"], dresses[0].replace(row["answer"], other["answer"])) is not True
