"""Ctrl-C and SIGTERM (a preempted job) end a sitting alike, so that files are closed on the way out.

Libraries written in C may swallow a KeyboardInterrupt and raise an error of their own, which would read as a candidate
that cannot be scored. So a signal is also remembered, and whoever turns errors into data asks `pending` first.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_came = threading.Event()


def pending() -> bool:
    """Whether a signal has come since the sitting began."""
    return _came.is_set()


@contextmanager
def interruptible() -> Iterator[None]:
    """Both signals raise KeyboardInterrupt in the block. Only the main thread can ask for that."""
    _came.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        _came.set()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _came.clear()
