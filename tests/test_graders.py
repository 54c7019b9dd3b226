"""Graders on worked answers, on hostile text, and on real reference answers."""

import json
import time
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitness import apart, math_verify
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
             "(A)", "-", "1/0", "1,2,3", "\x00", "½", "٣", "9" * 500, "\\}", "\\text{", "0^{-1}", "٠^{-1}", "\\", "="]
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
        ("#### 18 apples in 3 days", Fraction(18)),
        ("#### 5 dozen (60 eggs)", Fraction(5)),
        ("#### 12 + 6 = 18", Fraction(18)),
        ("#### 18 apples\n#### 17 apples in 3 days", Fraction(17)),
        ("\\boxed{18 \\text{ (in 3 days)}}", Fraction(18)),
        ("\\boxed{-\\text{5}}", Fraction(-5)),
        ("\\boxed{\\mathsf{5}}", Fraction(5)),
        ("\\boxed{2^{10}}", Fraction(1024)),
        ("\\boxed{-2^2}", Fraction(-4)),
        ("\\boxed{4 \\times 10^3}", Fraction(4000)),
        ("\\boxed{1.5 \\cdot 10^{-3} \\text{ m}^2}", Fraction(3, 2000)),
        ("\\boxed{0^{-1}}", None),
        ("\\boxed{2^{1000}}", None),
        ("\\boxed{(2)^3}", None),
        ("\\boxed{2^n}", None),
        ("\\boxed{\\mathbf{2}^{10}}", None),
        ("\\boxed{2^{10} + 1}", None),
        ("\\boxed{2^{10} = 1023}", Fraction(1023)),
        ("\\boxed{2\\sqrt{13}}", None),
        ("\\boxed{\\frac{\\sqrt{2}}{2}}", None),
        ("\\boxed{10\\pi}", None),
        ("\\boxed{10π}", None),
        ("\\boxed{10\\pi \\approx 31.4}", Fraction(157, 5)),
        ("\\boxed{5!}", None),
        ("\\boxed{12 \\text{ cm}^ 3}", Fraction(12)),
        ("\\boxed{3 \\times 4}", None),
        ("\\boxed{12 - 7}", None),
        ("\\boxed{12 + 6 = 18}", Fraction(18)),
        ("\\boxed{90^\\circ}", Fraction(90)),
        ("\\boxed{5^{\\text{th}}}", Fraction(5)),
        ("\\boxed{- 5}", Fraction(-5)),
        ("\\boxed{x = -\\,5}", Fraction(-5)),
        ("\\boxed{70 000}", Fraction(70000)),
        ("\\boxed{-\\$70 000 \\text{ in all}}", Fraction(-70000)),
        ("\\boxed{3 100 gram bags}", Fraction(100)),
        ("\\boxed{\\{5\\}}", Fraction(5)),
        ("\\boxed{\\}5} 6", Fraction(5)),
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
        ("Answer: A train takes 5 hours, so option B", "B"),
        ("Answer: A train takes 5 hours.", None),
        ("The answer is A because it is larger.", "A"),
        ("The answer is \\(\\text{B}\\).", "B"),
        ("The answer would be B.", "B"),
        ("The answer choice must be option B.", "B"),
        ("Ans: B", "B"),
        ("\\boxed{\\text{Option B}}", "B"),
        ("\\boxed{\\text{Options A}}", None),
        ("\\boxed{\\mathsf{B}}", "B"),
        ("\\boxed{B, 36}", "B"),
        ("\\boxed{\\text{B}\\ 36}", "B"),
        ("\\boxed{B, \\$36}", "B"),
        ("\\boxed{A 1, B 2}", None),
        ("\\boxed{b = 36}", None),
        ("\\boxed{(A) or B}", None),
        ("\\boxed{A. one B. two}", None),
        ("\\boxed{(B) 3 P.M.}", "B"),
        ("Option (B) is right. \\boxed{36}", "B"),
        ("Option (B) is right. \\boxed{A, B}", None),
        ("#### B\n\\boxed{36}", "B"),
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
        ("] } >", "\\boxed{] } >}", True),
        ("] } >", "so $\\boxed{] \\} >}$ for {", True),
        ("] } >", "\\[ \\boxed{\\text{] } >}} \\]", True),
        ("] } >", "\\boxed{\\texttt{] \\} >}}", True),
        ("] } >", "\\boxed{] }} >}", False),
        ("] } >", "\\boxed{] } >} no, \\boxed{] >}", False),
        ("] } >", "\\boxed{] } >", False),
        ("}", "\\boxed{}}", True),
        ("} >", "\\boxed{} >}", True),
        ("{ (", "\\boxed{{ (}", True),
        ("{1}", "\\boxed{\\text{\\{1\\}}}", True),
        ("(A)", "\\boxed{(A) 3:05}", True),
        ("(A)", "\\boxed{\\text{(A) blue}}", True),
        ("(A)", "\\boxed{A) blue}", True),
        ("(A)", "\\boxed{(A) or (B)}", False),
        ("(A)", "\\boxed{(A) or B}", False),
        ("(A)", "\\boxed{(A), B}", False),
        ("(A)", "\\boxed{A) blue, B) red}", False),
        ("(A)", "\\boxed{A. blue B. red}", False),
        ("(B)", "The answer is (B) because it is blue.", True),
        ("(B)", "The answer is (A) because it is blue.", False),
        ("(B)", "The answer is (B) because (A) is red.", False),
        ("(A)", "(A) 3:05", True),
        ("(A)", "Let us see.\n(A) is wrong.", False),
        ("-50", "\\boxed{\u221250}", True),
        ("\u221250", "The answer is -50.", True),
        ("1234", "\\boxed{1,234}", True),
        ("-1,234.5", "The answer is -1234.5.", True),
        ("1234", "12,34", False),
        ("[1234]", "[1,234]", False),
        ("True", "\\boxed{\\texttt{True}}", True),
        ("True", "The answer is $\\mathsf{True}$.", True),
    ],
)
def test_texts(reference, text, same):
    assert same_text(reference, text) is same


@pytest.mark.parametrize(
    "number", ["2^{10}", "4 \\times 10^3", "70 000", "18 \\text{ (in 3 days)}", "- 5", "2\\sqrt{13}"]
)
def test_a_reference_is_read_as_a_box_is(number):
    assert same_number(number, f"\\boxed{{{number}}}") is (None if "sqrt" in number else True)
    assert not same_number(number, "13")
    assert same_number(f"He had {number}, then 5 + 3 more, and so he has 8", "8")  # a worked solution


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
    "\\text{" * 10**5, "\\boxed{\\text{" + "\\{" * 40_000 + "}}", "\\boxed{" + "1 - " * 20_000 + "}", "=1" * 10**5,
    "\\boxed{A) " + "B. " * 30_000 + "}", "\\boxed{\\text{" + "} " * 40_000, "\\boxed{1" + " 000" * 20_000 + "}",
])  # fmt: skip
def test_a_megabyte_takes_no_time_and_earns_nothing(hostile):
    start = time.process_time()
    for grader in CHEAP:
        assert not grader("42", hostile)
        assert not grader("] }", hostile)
        assert not grader("(C)", hostile)
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
            "    print('not an answer')\n"
            "    return text.strip('$')\n"
            "def verify(a, b, **kw): return a == b\n"
        )
        root = str(Path(math_verify.__file__).parent.parent)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{root}")
        monkeypatch.setattr(apart, "SECONDS", 0.5)
        math_verify._apart.end()
        yield
        math_verify._apart.end()

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

    def test_the_answer_to_a_question_that_was_interrupted_is_not_that_to_the_next(self, monkeypatch):
        same = math_verify.same_expression
        assert same("5", "5") is True
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(apart.Apart, "_line", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            same("6", "6")
        assert [same(reference, answer) for reference, answer in (("7", "8"), ("9", "9"))] == [False, True]

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
