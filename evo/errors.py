"""Errors as a person reads them, and the one that several parts of a run raise."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ResumeError(ValueError):
    """A run cannot go on: something that it is bound to has changed."""


def said(error: BaseException) -> str:
    """What an error says, and what was noted on it on its way (`BaseException.add_note`): where it came from."""
    return " ".join([str(error), *getattr(error, "__notes__", ())])


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """What to say at the end of an error about a name that is none of those known: the nearest, if any is near.

    Args:
        name: that came.
        known: names that were expected.
        cutoff: how alike the two have to be, from 0 to 1 (see difflib.get_close_matches).
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""
