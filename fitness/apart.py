"""Runs a function in a process of its own that is ended when it takes too long: sympy may take for ever.

The process stays for later calls and is started anew after each time it had to be ended. It is asked in pickles and
answers in lines of JSON; what the function prints goes to stderr. Run as a module, this file is that process.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import pickle
import pkgutil
import select
import subprocess
import sys
from typing import Any

SECONDS = 5.0
"""For one call."""
_SECONDS_TO_START = 60.0
MAX_CHARACTERS = 10_000
"""Of an answer, from its end, that are worth comparing."""


class Apart:
    """A function that is called in a process of its own, started at the first call.

    Args:
        target: "module:function" of one of ours; what it returns has to be plain data, as JSON knows it.
        needs: a package that the process imports before the first call, which may take seconds.
        extra: mergefront's that installs it.
    """

    def __init__(self, target: str, needs: str, extra: str) -> None:
        self._target, self._needs, self._extra = target, needs, extra
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.end)

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns.

        Raises:
            TimeoutError: after SECONDS, or if the process dies; it is ended.
            RuntimeError: if the process does not start.
        """
        try:
            process = self._started()
            assert process.stdin is not None
            pickle.dump(arguments, process.stdin)
            process.stdin.flush()
            return json.loads(self._line(process, SECONDS))
        except BrokenPipeError:
            self.end()
            raise TimeoutError("the process that compares answers has died") from None
        except BaseException:  # an interrupt, too: its answer would be taken for that to the next question
            self.end()
            raise

    def end(self) -> None:
        """Kill it, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            command = [sys.executable, "-m", "fitness.apart", self._target, self._needs]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            try:
                self._line(self._process, _SECONDS_TO_START)  # that it is ready
            except TimeoutError:  # no answer's fault: every one of them would be counted as too hard to tell
                raise RuntimeError(
                    f"the process that compares answers did not start: expected `python -c 'import {self._needs}'` to "
                    f"work (pip install 'mergefront[{self._extra}]')"
                ) from None
        return self._process

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        line = process.stdout.readline() if ready else b""
        if not line:
            raise TimeoutError(f"no answer within {seconds:g} seconds")
        return line


def _serve(target: str, needs: str) -> None:
    function, answers = pkgutil.resolve_name(target), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    logging.disable(logging.WARNING)
    __import__(needs)
    print(file=answers)
    while True:
        try:
            arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        print(json.dumps(function(*arguments)), file=answers)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
