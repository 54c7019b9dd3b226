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
_ESCAPED = re.compile(r"(?<!\\)\\([{}])")
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
    (re.compile(r"(?<=[A-Za-z})])(?<!\d[})]) ?\^ ?(?:\{-?\d{1,3}\}|\d)"), ""),  # the power of a unit or a variable
    (re.compile(rf"(?<=\d)(?:{_BLANK}|\\[,;! ])?(?=\\[dtc]?frac)"), " "),
    (re.compile(rf"\\[dtc]?frac{_ARGUMENT}{_ARGUMENT}"), r"\1\2/\3\4 "),
)
"""What to replace, in this order, for all of a number to be plain: 3\\frac12 is "3 1/2"."""
_EQUALS = re.compile(r"=|≈|\\approx(?![A-Za-z])")
_POWER = re.compile(r"(-?)(?:(\d{1,9}(?:\.\d{1,9})?) ?(?:\\times|\\cdot|×) ?)?(\d{1,9})\^(?:\{ ?(-?\d{1,2}) ?\}|(\d))")
# What makes more of a number than its digits say; powers of units are gone by then, and 90^\circ is 90.
_EXPRESSION = re.compile(
    r"\\(?:sqrt|pi|times|cdot|div|binom|log|ln)(?![A-Za-z])|[√π]|\d[})]?!|\d {0,2}[-+*×·] {0,2}\d"
    r"|\^ ?\{? ?[-+(]?(?:\d|[a-z]\b)"
)
_APART = re.compile(r"^([-+])(?:\s|\\[,;! ]){1,9}")  # a sign and its number
_BLANK_GROUPS = re.compile(r"[^\w.]{0,3}\d{1,3}(?: \d{3}){1,20}\W{0,3}")
_COMMA_GROUPS = re.compile(r"-?\d{1,3}(?:,\d{3}){1,20}(?:\.\d{1,400})?")
_WRAPPER = r"\\(?:text|textbf|textit|textrm|texttt|textsf|mathrm|mathbf|mathtt|mathsf|mbox)\{"
_WRAPPED = re.compile(rf"{_WRAPPER}([^{{}}\\]*(?:\\.[^{{}}\\]*)*)\}}", re.DOTALL)
_LOOSELY_WRAPPED = re.compile(rf"^\s*{_WRAPPER}(.*)\}}\s*$")
# "B", "(b)", "(B) 36", "B. 36", "B, 36", "Option B"; but not "(A) or B", "A) 1, B) 2", "A. one B. two".
_LETTER = re.compile(
    r"(?:\W{0,9}(?i:option|choice|answer)\b)?\W{0,9}([A-Za-z])(?:\W*|[,;\s\\$]{1,9}\d[^A-Za-z]*"
    r"|[).:](?!\W{0,9}(?:(?:or|and)\b|[,/&])\W{0,9}[A-Z]\b)(?!.*(?:\b[A-Z]\)|(?<![\w.])[A-Z](?::|\.\s))).*)",
    re.DOTALL,
)
_LONE_LETTER = re.compile(r"\b[A-Za-z]\b")
# Lower case only where it is no article or variable: in brackets, or at the end of a line or clause. An "A" before
# a word is an article as well, unless it is a word that follows none.
_NAMED_LETTER = re.compile(
    r"(?m)\b(?i:answer|ans)\b(?:\W{1,10}(?i:is|choice|option|would|should|must|will|be)\b){0,4}\W{0,10}"
    r"((?!A (?!(?:and|as|because|but|for|is|or|since|so|which|with)\b)[a-z])[A-Z]\b(?!['\u2019])"
    r"|(?<!['\u2019])[a-z](?=\)|[^\w\n]{0,9}$|\.\s))"
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

    Looked for in this order: the last \boxed{...}, the last `#### ...` that starts with a number (which counts, or
    the last one of a line with a "="), the last number of the text after the thinking part. Of expressions in a box,
    only fractions and small powers are numbers: 3\frac12, 4 \times 10^3, but not 2\sqrt{13}.
    """
    answer = final_number(text)
    if answer is None:
        return None
    is_solution = "####" in reference or len(reference.split()) > 9
    expected = final_number(reference if is_solution else f"\\boxed{{{reference}}}")  # 2^{10} is 1024 in both
    return expected is not None and answer == expected


def same_choice(reference: str, text: str) -> bool | None:
    r"""Compare the letter of an option ("B", "(B)", "b") with the one that a text settles on.

    Looked for in this order: the last \boxed{...} if it has a letter, the last `#### B`, the last "answer is B" or
    "Answer: B", the last "option B", the last "(B)", and a text that is a letter alone ("b", "B. 36").
    """
    answer = final_choice(text)
    return None if answer is None else answer == _letter(reference)


def same_text(reference: str, text: str) -> bool | None:
    r"""Compare a text's answer with the reference, ignoring case, outer blanks, quotes and a full stop.

    The answer is the last \boxed{...}, or what follows the last `####`, "answer is" or "Answer:" (in the next line
    with text where theirs has none), or else the whole of what stands after the thinking part, or its last line.
    Of a reference like "(A)", the brackets may be left out, and the option's text may follow. Braces may be escaped.
    """
    whole = answer_part(text).strip()
    if not whole:
        return None
    candidates = [whole, whole.splitlines()[-1]]
    if (boxed := _boxed(whole, loose=_is_loose(reference))) is not None:
        candidates = [boxed]
    elif marks := [*_ANSWER_MARK.finditer(whole)]:
        candidates = [whole[marks[-1].end() :].lstrip(_DRESS).partition("\n")[0]]
    brackets = "()" if _BRACKETED_LETTER.fullmatch(reference) else ""
    # Several lines without a mark may discuss the options: "(A) is wrong."
    if brackets and len(set(candidates)) == 1 and _letter(candidates[0]) == _letter(reference):
        return True
    return _plain(reference).strip(brackets) in [_plain(candidate).strip(brackets) for candidate in candidates]


def final_number(text: str) -> Fraction | None:
    """The number that a text gives as its answer, or None."""
    text = answer_part(text).translate(_SIGNS)
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    if (boxed := _boxed(text)) is not None:
        return _boxed_number(boxed)
    line = _hashed(text, _NUMBER_FIRST.match)
    if line is None:
        return _number(text)
    return _number(line, which=-1 if "=" in line else 0)  # "12 + 6 = 18"; "18 apples in 3 days"


def final_choice(text: str) -> str | None:
    """The letter that a text gives as its answer, in upper case, or None."""
    text = _WRAPPED.sub(r"\1", answer_part(text))
    boxed = _boxed(text)
    marked = boxed if boxed is not None and _LONE_LETTER.search(boxed) else _hashed(text, _letter)
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


def _hashed(text: str, is_answer: Callable[[str], object]) -> str | None:
    """The last `#### ...` that is an answer and no heading."""
    return next(filter(is_answer, reversed(_HASHES.findall(text))), None)


def _boxed(text: str, loose: bool = False) -> str | None:
    r"""The content of the last \boxed{...} that has any.

    Where an answer is loose (its own braces do not balance), they end the box early unless they are escaped: it then
    ends at the line's last brace, and what looks like an empty box may be none.
    """
    text = text if loose else _EMPTY_BOX.sub("", text)
    start = max(text.rfind(box) + len(box) if box in text else -1 for box in _BOXES)
    if start < 0:
        return None
    content, depth = None, 1
    for i, character in enumerate(_ESCAPED.sub("  ", text[start:])):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            content = text[start : start + i]
            break
    if loose and not (content and _is_loose(content)):
        content = text[start:].partition("\n")[0].rpartition("}")[0]
        content = _LOOSELY_WRAPPED.sub(r"\1", content)
    return content


def _is_loose(text: str) -> bool:
    return text.count("{") != text.count("}")


def _letter(text: str) -> str | None:
    """The letter of a text that names one option, in upper case."""
    found = _LETTER.fullmatch(_WRAPPED.sub(r"\1", text))
    return found[1].upper() if found else None


def _boxed_number(box: str) -> Fraction | None:
    """The number that a box is: its last side with a number, without remarks, unless that is an expression."""
    bare = _WRAPPED.sub(" ", box)
    box = bare if _NUMBER.search(bare) else _WRAPPED.sub(r"\1", box)
    side = next(filter(_NUMBER.search, reversed(_EQUALS.split(box))), "").strip(_DRESS)
    if power := _POWER.fullmatch(side):
        sign, factor, base, braced, digit = power.groups()
        exponent = int(braced or digit)
        if Fraction(base) or exponent >= 0:
            return Fraction(f"{sign}1") * Fraction(factor or 1) * Fraction(base) ** exponent
    if _EXPRESSION.search(side):
        return None
    side = _APART.sub(r"\1", side)
    return _number(side.replace(" ", "") if _BLANK_GROUPS.fullmatch(side) else side)


def _number(text: str, which: int = -1) -> Fraction | None:
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    sign, whole, top, bottom = numbers[which]
    try:
        size = int(whole or 0) + _as_fraction(top) / _as_fraction(bottom or "1")
    except ZeroDivisionError:
        return None
    return -size if sign == "-" else size


def _as_fraction(digits: str) -> Fraction:
    return Fraction(re.sub(r"[^-\d.]", "", digits))


def _plain(text: str) -> str:
    text = _ESCAPED.sub(r"\1", _WRAPPED.sub(r"\1", text)).translate(_SIGNS)
    text = text.lstrip(_DRESS).rstrip(_DRESS + ".").casefold()
    return text.replace(",", "") if _COMMA_GROUPS.fullmatch(text) else text
