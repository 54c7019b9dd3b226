"""Compares mathematical expressions with math-verify (extra `math`).

It parses LaTeX and compares with sympy, which may take for ever on hostile input: hence in a process apart.
"""

from __future__ import annotations

from fitness.apart import MAX_CHARACTERS, Apart
from fitness.graders import answer_part


def same_expression(reference: str, text: str) -> bool | None:
    """See fitness.graders.Grader.

    Raises:
        TimeoutError: if it takes too long.
    """
    answer = answer_part(text)[-MAX_CHARACTERS:]
    if not answer.strip():
        return None
    same: bool | None = _apart(reference, answer)
    return same


def compare(reference: str, answer: str) -> bool | None:
    """The same in this process, for as long as it takes."""
    from math_verify import parse, verify

    try:
        given = parse(answer, parsing_timeout=None)
        expected = parse(f"${reference}$", parsing_timeout=None) or parse(reference, parsing_timeout=None)
        return bool(verify(expected, given, timeout_seconds=None)) if given else None
    except Exception:  # what it cannot parse is no answer
        return None


_apart = Apart("fitness.math_verify:compare", "math_verify", "math")
