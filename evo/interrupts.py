"""Ctrl-C, SIGTERM (a preempted job) and SIGHUP (a connection that is lost) end a sitting alike: files are closed on the
way out.

Libraries written in C may swallow a KeyboardInterrupt and raise an error of their own, which would read as a candidate
that cannot be scored. So a signal is also remembered, and whoever turns errors into data asks `pending` first.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_came = threading.Event()


def pending() -> bool:
    """Whether a signal has come since the sitting began."""
    return _came.is_set()


@contextmanager
def interruptible() -> Iterator[None]:
    """The signals raise KeyboardInterrupt in the block. Only the main thread can ask for that."""
    _came.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        _came.set()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _came.clear()


def _signals() -> Iterator[signal.Signals]:
    """Those that end a sitting, among them SIGHUP where there is one and `nohup` does not keep it away."""
    yield from (signal.SIGINT, signal.SIGTERM)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        yield signal.SIGHUP
