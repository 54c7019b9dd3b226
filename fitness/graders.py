"""Finds the answer in a completion and compares it with the reference.

Total functions: none raises, whatever the text, and each takes time linear in it. Where a text gives several
answers, the last counts, so that listing more never helps. A grader of its own process may run out of time,
which `grade` reports apart from a wrong answer.
"""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import string
from collections.abc import Callable
from fractions import Fraction

from fitness.types import Completion, Finish, Verdict

Grader = Callable[[str, str], bool | None]
"""(reference answer, text) -> right, wrong, or None where the text holds no answer. May raise TimeoutError."""

GRADERS = {
    "number": "fitness.graders:same_number",
    "choice": "fitness.graders:same_choice",
    "exact": "fitness.graders:same_text",
    "math": "fitness.math_verify:same_expression",
}
"""Name -> Grader."""
EXTRAS = {"math": ("math_verify", "math")}
"""Grader -> the package that it needs, and mergefront's extra that installs it."""

_MAX_CHARACTERS = 100_000  # of the end of a text: a run-away generation must not cost quadratic time
_THOUGHT, _END_OF_THOUGHT = "<think>", "</think>"
_SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-", "\uff0d": "-", "\u2044": "/", "\uff0c": ",", "\uff0e": "."})
_BOXES = ("\\boxed{", "\\fbox{")
_EMPTY_BOX = re.compile(r"\\(?:boxed|fbox)\{\s*\}")
_HASHES = re.compile(r"####\s*([^\n]*)")
# Bounded repeats keep the time linear; a run of more than 400 digits is no number.
_BLANK = r"[ \u00a0\u202f]"
_SEPARATOR = r"(?:,\\!|\{,\}|\\[,;! ]|[,\u00a0\u202f])"  # of thousands; no plain blank: "3 100 gram bags"
_DIGITS = (
    rf"(?:(?:\d{{1,3}}(?:{_SEPARATOR}\d{{3}}){{1,20}}|\d{{1,400}})(?!\d)(?:\.\d{{1,400}})?"
    r"|(?<![A-Za-z\d.])\.\d{1,400})"
)
# A sign, perhaps before a currency; the whole part of "3 1/2"; digits; a denominator. The look-behinds keep the
# minus of "7-3" from becoming a sign, and the 1 of "x_1" or the 3 of "1.2.3" from being a number.
_NUMBER = re.compile(
    r"(?<![A-Za-z\d])(?<!\d\.)(?<![A-Za-z\d]_)"
    rf"(?:([-+])(?:\\?[$€£¥])?)?(?:(\d{{1,20}}){_BLANK}(?=\d{{1,50}}/))?({_DIGITS})(?:{_BLANK}?/{_BLANK}?(-?{_DIGITS}))?"
)
_NUMBER_FIRST = re.compile(rf"[^\w\n]{{0,9}}{_DIGITS}(?![.):]\W{{0,9}}[^\W\d])")  # not the "1. Buy apples" of a heading
_ARGUMENT = rf"{_BLANK}?(?:\{{ ?(-?{_DIGITS}) ?\}}|(\d))"
_LATEX = (
    (re.compile(r"(?<=[A-Za-z})]) ?\^(?:\{-?\d{1,3}\}|\d)"), ""),  # the power of a unit or a variable
    (re.compile(rf"(?<=\d)(?:{_BLANK}|\\[,;! ])?(?=\\[dtc]?frac)"), " "),
    (re.compile(rf"\\[dtc]?frac{_ARGUMENT}{_ARGUMENT}"), r"\1\2/\3\4 "),
)
"""What to replace, in this order, for all of a number to be plain: 3\\frac12 is "3 1/2"."""
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\{([^{}]*)\}")
_LETTER = re.compile(r"\W{0,9}([A-Za-z])(?:\W*|[).:](?!.*\b[A-Z]\)).*)", re.DOTALL)  # "B", "(b)", "(B) 36", "B. 36"
# Lower case only where it is no article or variable: in brackets, or at the end of a line or clause.
_NAMED_LETTER = re.compile(
    r"(?m)\b(?i:answer)\b(?:\W{1,10}(?i:is|choice|option)\b){0,3}\W{0,10}"
    r"([A-Z]\b(?!['\u2019])|(?<!['\u2019])[a-z](?=\)|[^\w\n]{0,9}$|\.\s))"
)
_NAMED_OPTION = re.compile(r"\b(?i:choice|option)\W{0,10}(?i:is|:)?\W{0,10}([A-Z])\b(?!['\u2019])")
_BRACKETED_LETTER = re.compile(r"\(([A-Z])\)")
_ANSWER_MARK = re.compile(r"(?i:#{4,}(?:[^\w\n]{0,4}(?:final )?answer\b)?|\banswer[*_]{0,4}(?: is\b|:)):?")
_DRESS = string.whitespace + "\u00a0\"'`*$\u201c\u201d\u2018\u2019"  # what an answer may be wrapped in


def get_grader(name: str) -> Grader:
    """The grader of a name.

    Raises:
        ValueError: if there is none, or the package that it needs is not installed.
    """
    if name not in GRADERS:
        raise ValueError(f"grader: expected one of {', '.join(GRADERS)}, got {name!r}")
    package, extra = EXTRAS.get(name, (None, None))
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(f"grader {name!r} needs the package {package}: pip install 'mergefront[{extra}]'")
    grader: Grader = pkgutil.resolve_name(GRADERS[name])
    return grader


def grade(grader: Grader, reference: str, completion: Completion) -> Verdict:
    """Judge a completion: cut off, without an answer, right, wrong, or too hard to tell in time."""
    if completion.finish == Finish.LENGTH:
        return Verdict.TRUNCATED
    try:
        same = grader(reference, completion.text)
    except TimeoutError:
        return Verdict.TIMEOUT
    if same is None:
        return Verdict.UNPARSABLE
    return Verdict.CORRECT if same else Verdict.WRONG


def same_number(reference: str, text: str) -> bool | None:
    r"""Compare the number that a text ends on with the reference, as exact fractions.

    Looked for in this order: the last \boxed{...}, the last `#### ...` that starts with a number, the last number
    of the text after the thinking part.
    """
    answer = final_number(text)
    if answer is None:
        return None
    expected = final_number(reference)
    return expected is not None and answer == expected


def same_choice(reference: str, text: str) -> bool | None:
    r"""Compare the letter of an option ("B", "(B)", "b") with the one that a text settles on.

    Looked for in this order: the last \boxed{...}, the last `#### B`, the last "answer is B" or "Answer: B", the last
    "option B", the last "(B)", and a text that is a letter alone ("b", "B. 36").
    """
    answer = final_choice(text)
    return None if answer is None else answer == _letter(reference)


def same_text(reference: str, text: str) -> bool | None:
    r"""Compare a text's answer with the reference, ignoring case, outer blanks, quotes and a full stop.

    The answer is the last \boxed{...}, or what follows the last `####`, "answer is" or "Answer:" (in the next line
    with text where theirs has none), or else the whole of what stands after the thinking part, or its last line.
    The brackets of a reference like "(A)" may be left out.
    """
    whole = answer_part(text).strip()
    if not whole:
        return None
    candidates = [whole, whole.splitlines()[-1]]
    if (boxed := _boxed(whole)) is not None:
        candidates = [boxed]
    elif marks := [*_ANSWER_MARK.finditer(whole)]:
        candidates = [whole[marks[-1].end() :].lstrip(_DRESS).partition("\n")[0]]
    brackets = "()" if _BRACKETED_LETTER.fullmatch(reference) else ""
    return _plain(reference).strip(brackets) in [_plain(candidate).strip(brackets) for candidate in candidates]


def final_number(text: str) -> Fraction | None:
    """The number that a text gives as its answer, or None."""
    text = answer_part(text).translate(_SIGNS)
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    marked = _marked(text, _NUMBER_FIRST.match)
    return _last_number(text if marked is None else marked)


def final_choice(text: str) -> str | None:
    """The letter that a text gives as its answer, in upper case, or None."""
    text = answer_part(text)
    marked = _marked(text, _letter)
    if marked is not None:
        return _letter(marked)
    for pattern in (_NAMED_LETTER, _NAMED_OPTION, _BRACKETED_LETTER):
        if letters := pattern.findall(text):
            return str(letters[-1]).upper()
    return _letter(text) if len(text) < 100 else None


def answer_part(text: str) -> str:
    """What stands after the thinking part; before it, where a thought was opened and never closed."""
    text = text[-_MAX_CHARACTERS:].rpartition(_END_OF_THOUGHT)[2]
    return text.partition(_THOUGHT)[0]


def _marked(text: str, is_answer: Callable[[str], object]) -> str | None:
    r"""The content of the last \boxed{...}, or else of the last `#### ...` that is an answer and no heading."""
    boxed = _boxed(text)
    return next(filter(is_answer, reversed(_HASHES.findall(text))), None) if boxed is None else boxed


def _boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} that has any."""
    text = _EMPTY_BOX.sub("", text)
    start = max(text.rfind(box) + len(box) if box in text else -1 for box in _BOXES)
    if start >= 0:
        depth = 1
        for i in range(start, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[start:i]
    return None


def _letter(text: str) -> str | None:
    """The letter of a text that names one option, in upper case."""
    found = _LETTER.fullmatch(_WRAPPED.sub(r"\1", text))
    return found[1].upper() if found else None


def _last_number(text: str) -> Fraction | None:
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    sign, whole, top, bottom = numbers[-1]
    try:
        size = int(whole or 0) + _as_fraction(top) / _as_fraction(bottom or "1")
    except ZeroDivisionError:
        return None
    return -size if sign == "-" else size


def _as_fraction(digits: str) -> Fraction:
    return Fraction(re.sub(r"[^-\d.]", "", digits))


def _plain(text: str) -> str:
    return _WRAPPED.sub(r"\1", text).lstrip(_DRESS).rstrip(_DRESS + ".").casefold()
