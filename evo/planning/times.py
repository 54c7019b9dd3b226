"""From bytes to seconds: as a range before anything is measured. And both for people."""

from __future__ import annotations

import math

from evo.config import Budget


def candidate_seconds(
    merged: int,
    model: int,
    row: int,
    rows: int,
    answers: int,
    tokens: tuple[float, float],
    bandwidth: float,
    arriving: float = 0.0,
) -> tuple[float, float]:
    """Range of seconds that a candidate takes: merge it, then generate.

    A step reads the whole model and a mean answer's keys and values, once at the least; how far above this floor an
    engine stays is not known before it is measured: ten times, and 20 ms a step, at the most. A merge takes three times
    its bytes at the most.

    Args:
        merged: bytes that a merge reads and writes.
        model: bytes of the resident model.
        row: bytes of an answer while it is decoded.
        rows: answers decoded together.
        answers: of a candidate.
        tokens: range of the mean tokens of an answer.
        bandwidth: bytes a second that a copy reads and writes.
        arriving: seconds that sources take to come to where they are merged, which is no part of `merged` then.
    """
    merge, batches = merged / bandwidth + arriving, math.ceil(answers / rows)
    step = (model + row * rows / 2) / bandwidth
    return merge + batches * tokens[0] * step, 3 * merge + batches * tokens[1] * (10 * step + 0.02)


def search_seconds(budget: Budget, candidate: float, tokens: float) -> float:
    """Of a whole budget, from a candidate's seconds and tokens: whichever limit comes first."""
    limits = [
        budget.candidates and budget.candidates * candidate,
        budget.tokens and math.ceil(budget.tokens / tokens) * candidate,
        budget.hours and 3600 * budget.hours,
    ]
    return min(limit for limit in limits if limit)


def spans(low: float, high: float) -> str:
    """A range of times for people; one time if it is narrow."""
    return span(high) if high < 1.01 * low else f"{span(low)} to {span(high)}"


def size(n_bytes: float) -> str:
    """A number of bytes for people."""
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"


def span(seconds: float) -> str:
    """A time for people."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
