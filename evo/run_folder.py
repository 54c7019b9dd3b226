"""A run's folder: the ledger, who is working on it, and how to ask them to stop."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

LOCK_FILE, HOLDER_FILE, STOP_FILE = "lock", "holder.json", "stop"


class BusyError(RuntimeError):
    """Another process is working on the run."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a run's lock; the operating system drops it when the process ends, however it ends.

    Raises:
        BusyError: naming the holder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise BusyError(f"{folder} is not a folder: expected a new one, or that of a run") from None
    lock = filelock.FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=1)  # `status` shares it for an instant when it looks
    except filelock.Timeout:
        raise BusyError(
            f"another process works on {folder} ({holder(folder)}): wait for it, or end it with "
            f"`mergefront stop {shlex.quote(str(folder))}`"
        ) from None
    try:
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        (folder / HOLDER_FILE).write_text(json.dumps(me))
        (folder / STOP_FILE).unlink(missing_ok=True)  # left over from an earlier sitting
        yield
    finally:
        (folder / HOLDER_FILE).unlink(missing_ok=True)
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether some process is working on a run.

    The lock is only shared, so that two who look do not take each other for one who works, and its file only read, so
    that a folder that cannot be written is answered, too.
    """
    try:
        with open(folder / LOCK_FILE, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # filelock's is an exclusive one of the same kind
    except (FileNotFoundError, NotADirectoryError):
        return False
    except BlockingIOError:
        return True
    except OSError:  # the disk knows no such locks, where filelock has another way
        try:
            with filelock.FileLock(folder / LOCK_FILE, timeout=0):
                return False
        except filelock.Timeout:
            return True
    return False


def holder(folder: Path) -> str:
    """Who holds a run, in words."""
    try:
        data = json.loads((folder / HOLDER_FILE).read_text())
        return f"process {data['pid']} on {data['host']}"
    except (OSError, ValueError, KeyError):
        return "unknown process"


def request_stop(folder: Path) -> None:
    """Ask whoever works on a run to stop after the candidate in flight."""
    (folder / STOP_FILE).touch()


def stop_requested(folder: Path) -> bool:
    """Whether somebody has asked this run to stop."""
    return (folder / STOP_FILE).exists()
