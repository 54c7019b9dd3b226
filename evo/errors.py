"""Errors as a person reads them."""

from __future__ import annotations


def said(error: BaseException) -> str:
    """What an error says, and what was noted on it on its way (`BaseException.add_note`): where it came from."""
    return " ".join([str(error), *getattr(error, "__notes__", ())])
