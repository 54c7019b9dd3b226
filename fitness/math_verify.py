"""Compares mathematical expressions with math-verify, in a process of its own that is ended when it takes too long.

math-verify (extra `math`) parses LaTeX and compares with sympy, which may take for ever on hostile input. The
process is started at the first comparison and again after each time it had to be ended; the two talk in lines
of JSON. Run as a module, this file is that process.
"""

from __future__ import annotations

import atexit
import json
import select
import subprocess
import sys
from typing import Any

from fitness.graders import answer_part

SECONDS = 5.0
"""For one comparison."""
_SECONDS_TO_START = 60.0
_MAX_CHARACTERS = 10_000  # of the end of an answer


def same_expression(reference: str, text: str) -> bool | None:
    """See fitness.graders.Grader.

    Raises:
        TimeoutError: after SECONDS.
    """
    answer = answer_part(text)[-_MAX_CHARACTERS:]
    if not answer.strip():
        return None
    same: bool | None = _process.ask({"reference": reference, "answer": answer}, SECONDS)
    return same


class _Process:
    """One resident process that is asked line by line."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, question: dict[str, str], seconds: float) -> Any:
        """Its answer.

        Raises:
            TimeoutError: if there is none in time; the process is ended.
            RuntimeError: if the process does not start.
        """
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            self.end()
            raise TimeoutError("the process that compares expressions has died") from None
        return json.loads(self._line(process, seconds))

    def end(self) -> None:
        """Kill it, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fitness.math_verify"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            try:
                self._line(self._process, _SECONDS_TO_START)  # that it is ready
            except TimeoutError:  # no answer's fault: every one of them would be counted as too hard to tell
                raise RuntimeError(
                    "the process that compares expressions did not start: expected `python -c 'import math_verify'` to "
                    "work (pip install 'mergefront[math]')"
                ) from None
        return self._process

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        line = process.stdout.readline() if ready else b""
        if not line:
            self.end()
            raise TimeoutError(f"no answer within {seconds:g} seconds")
        return line


_process = _Process()
atexit.register(_process.end)


def _compare(reference: str, answer: str) -> bool | None:
    from math_verify import parse, verify

    try:
        given = parse(answer, parsing_timeout=None)
        expected = parse(f"${reference}$", parsing_timeout=None) or parse(reference, parsing_timeout=None)
        return bool(verify(expected, given, timeout_seconds=None)) if given else None
    except Exception:  # what it cannot parse is no answer
        return None


def _serve() -> None:
    import math_verify  # noqa: F401  # before saying that it is ready: the import takes seconds

    print(flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(_compare(question["reference"], question["answer"])), flush=True)


if __name__ == "__main__":
    _serve()
