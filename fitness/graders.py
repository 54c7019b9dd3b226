"""Finds the answer in a completion and compares it with the reference. Total functions: none raises."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from fitness.types import Completion, Finish, Verdict

GRADERS = {"number": "fitness.graders:same_number", "exact": "fitness.graders:same_text"}
"""Name -> function(reference answer, text) -> True, False, or None where the text holds no answer."""

_MAX_CHARACTERS = 100_000  # of the end of a text: a run-away generation must not cost quadratic time
_END_OF_THOUGHT = "</think>"
_SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-", "\uff0d": "-"})
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_HASHES = re.compile(r"####\s*([^\n]*)")
# Digits grouped by commas, or plain; an optional decimal part; an optional denominator. The look-behind
# keeps the minus of "7-3" from becoming a sign. Bounded repeats keep the time linear.
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3}){1,20}|\d{1,400})(?:\.\d{1,400})?(?:/\d{1,400})?")


def grade(grader: Callable[[str, str], bool | None], reference: str, completion: Completion) -> Verdict:
    """Judge a completion: cut off, without an answer, right or wrong."""
    if completion.finish is Finish.LENGTH:
        return Verdict.TRUNCATED
    same = grader(reference, completion.text)
    if same is None:
        return Verdict.UNPARSABLE
    return Verdict.CORRECT if same else Verdict.WRONG


def same_number(reference: str, text: str) -> bool | None:
    r"""Compare the number that a text ends on with the reference, as exact fractions.

    Looked for in this order: the last \boxed{...}, the last `#### ...`, the last number of the text after
    the thinking part.
    """
    answer = final_number(text)
    if answer is None:
        return None
    expected = final_number(reference)
    return expected is not None and answer == expected


def same_text(reference: str, text: str) -> bool | None:
    """Compare what stands after the thinking part with the reference, ignoring case and outer blanks."""
    answer = _after_thought(text).strip()
    return answer.casefold() == reference.strip().casefold() if answer else None


def final_number(text: str) -> Fraction | None:
    """The number that a text gives as its answer, or None."""
    text = _after_thought(text).translate(_SIGNS)
    for marker in (_BOXED, _HASHES):
        if marked := marker.findall(text):
            return _last_number(marked[-1])
    return _last_number(text)


def _after_thought(text: str) -> str:
    return text[-_MAX_CHARACTERS:].rpartition(_END_OF_THOUGHT)[2]


def _last_number(text: str) -> Fraction | None:
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    try:
        return Fraction(numbers[-1].replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None
