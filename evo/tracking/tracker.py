"""Follows a run into MLflow in a process of its own, so that no trouble of MLflow's reaches a search.

MLflow blocks for minutes when its server is away, and its asynchronous logging loses points without a word.
So the search never calls it: a second process reads the ledger, replays what is new with synchronous calls
and short time-outs, and tries for ever while the search runs. After that it makes one last attempt, in
bounded time; `sync` finishes what is left, at any later time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

import filelock

from evo.config import Tracking
from evo.ledger import Ledger
from evo.run_folder import is_held
from evo.tracking import ARTIFACTS, STORE_FILE
from evo.tracking.replay import OFFSET_FILE, Offset, Replay, Report, Target

LOG_FILE, LOCK_FILE = "tracker.log", "tracker.lock"
DRAIN_SECONDS = 45.0
"""How long the end of a search waits for the last attempt, which fails within a few if MLflow is away."""
_POLL_SECONDS, _LONGEST_PAUSE_SECONDS = 2.0, 60.0
_REST = 10.0  # an attempt is followed by a pause of so many times its duration
_ENVIRONMENT = {  # a user's own settings win
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "OMP_NUM_THREADS": "1",
}
_TARGET = "MERGEFRONT_TRACKER"  # in the environment, because a URI may hold a password and commands are public

_ANEW = (
    f". To have it written anew: delete {STORE_FILE}, {ARTIFACTS} and {OFFSET_FILE} in the run's folder (the ledger "
    "has all), then `mergefront sync`"
)

log = logging.getLogger("mergefront.tracker")


class TrackerError(RuntimeError):
    """MLflow could not be brought up to date."""


def default_uri(folder: Path) -> str:
    """The store that a run has of its own, inside its folder."""
    return f"sqlite:///{folder.resolve() / STORE_FILE}"


def is_behind(folder: Path) -> bool:
    """Whether the ledger holds what has not been replayed yet, so that a `sync` would help."""
    offset = Offset.load(folder)
    with closing(Ledger.open(folder, read_only=True)) as ledger:
        return offset is None or offset.seq < ledger.last_seq()


def how_to_look(folder: Path, uri: str | None = None) -> str:
    """What to type, or which address to open, to see a run in MLflow.

    Args:
        folder: the run's.
        uri: of the tracking store; default: the one inside the run folder.
    """
    offset = Offset.load(folder)
    page = "" if offset is None else offset.page
    if uri and uri.startswith("http"):
        return uri.rstrip("/") + page
    store = shlex.quote(uri or default_uri(folder))
    return f"mlflow ui --backend-store-uri {store}   then open http://127.0.0.1:5000{page}"


@contextmanager
def following(folder: Path, tracking: Tracking) -> Iterator[None]:
    """Track a run while the block works on it. Nothing that MLflow does or fails to do disturbs the block.

    Leaving it takes as long as the last attempt, at most DRAIN_SECONDS.
    """
    process = None
    with contextlib.suppress(OSError):  # no memory, no processes, no disk: the search is worth more than its tracking
        process = _start(folder, tracking.uri, tracking.experiment, "follow") if tracking.enabled else None
    try:
        yield
    finally:
        if process is not None:
            _finish(process)


def sync(folder: Path, uri: str | None = None, experiment: str | None = None) -> Report:
    """Bring MLflow up to date with a run, now.

    Args:
        folder: the run's.
        uri: of the tracking store; default: the one inside the run folder.
        experiment: its name; default: as in a config.

    Raises:
        TrackerError: if that cannot be done.
        LedgerError: if there is no run in the folder.
    """
    Ledger.open(folder, read_only=True).close()
    try:
        process = _start(folder, uri, experiment or Tracking().experiment, "sync")
    except OSError as error:
        raise TrackerError(f"no process could be started to talk to MLflow: {error}") from error
    try:
        out, _ = process.communicate()
    finally:
        process.kill()  # if this was interrupted
    try:
        answer = json.loads(out.decode().strip().rpartition("\n")[2])
    except ValueError:
        raise TrackerError(f"the process that talks to MLflow ended early: see {folder / LOG_FILE}") from None
    if "error" in answer:
        raise TrackerError(f"{answer['error']} (more in {folder / LOG_FILE})")
    return Report(**answer)


def _start(folder: Path, uri: str | None, experiment: str, mode: str) -> subprocess.Popen[bytes]:
    """A session of its own keeps Ctrl-C in a terminal away from it; the end of its stdin tells it to end."""
    target = json.dumps({"uri": uri or default_uri(folder), "experiment": experiment})
    environment = {**_ENVIRONMENT, **os.environ, "MLFLOW_ENABLE_ASYNC_LOGGING": "false", _TARGET: target}
    with open(folder / LOG_FILE, "ab") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "evo.tracking.tracker", str(folder.resolve()), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if mode == "sync" else subprocess.DEVNULL,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )


def _finish(process: subprocess.Popen[bytes]) -> None:
    try:
        process.communicate(b".", timeout=DRAIN_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()  # loses nothing: the next one replays what is missing
        process.wait()


def main() -> None:
    """The process: `python -m evo.tracking.tracker RUN_DIR follow|sync`, the target in the environment."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its retries end in an exception that is logged
    with contextlib.suppress(OSError):
        os.nice(10)  # the search has the cores
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    target, lock = Target(**json.loads(os.environ.pop(_TARGET))), filelock.FileLock(folder / LOCK_FILE)
    replay, hint = Replay(folder, target), _ANEW if target.uri == default_uri(folder) else ""
    try:
        with lock.acquire(timeout=DRAIN_SECONDS if mode == "follow" else 0):  # an earlier sitting's may be draining
            if mode == "follow":
                _follow(replay)
            else:
                print(json.dumps(asdict(replay.attempt(running=is_held(folder)))))
    except filelock.Timeout:
        _fail("another process is bringing MLflow up to date with this run; nothing is left to do here")
    except Exception as error:
        log.exception("gave up")
        reason = str(error).partition("\n")[0]  # SQL goes on for pages
        _fail(f"MLflow could not be brought up to date: {type(error).__name__}: {reason}{hint}")


def _fail(reason: str) -> None:
    log.error(reason)
    print(json.dumps({"error": reason}))


def _follow(replay: Replay) -> None:
    """Attempt after attempt until the search has ended, and one more then."""
    ended, parent, pause = threading.Event(), os.getppid(), _POLL_SECONDS
    threading.Thread(target=_await_end, args=(ended,), daemon=True).start()
    while True:
        last = ended.is_set() or os.getppid() != parent  # a fork of a killed search may keep the pipe open
        start = time.monotonic()
        try:
            replay.attempt(running=not last)
            pause = min(max(_POLL_SECONDS, _REST * (time.monotonic() - start)), _LONGEST_PAUSE_SECONDS)
        except Exception as error:
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            then = "`mergefront sync` finishes later" if last else f"trying again in {pause:g} s"
            log.warning("%s: %s; %s", type(error).__name__, error, then)
        if last:
            return
        ended.wait(pause)


def _await_end(ended: threading.Event) -> None:
    sys.stdin.buffer.read(1)  # a byte, or the end of a pipe whose other side was killed
    ended.set()


if __name__ == "__main__":
    main()
