"""The command, in a process of its own or, without the seconds that one takes to import torch, in this one."""

import subprocess
import sys
from subprocess import CompletedProcess

from typer.testing import CliRunner

from evo.cli import app


def mergefront(*arguments: object, **options) -> CompletedProcess[str]:
    """What a user's process says and how it ends; options are those of subprocess.run."""
    command = [sys.executable, "-m", "evo.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)


def invoke(*arguments: object, **options) -> CompletedProcess[str]:
    """The same of a call within this process, whose errors are raised if the command has not caught them."""
    command = list(map(str, arguments))
    result = CliRunner().invoke(app, command, catch_exceptions=False, **options)
    return CompletedProcess(command, result.exit_code, result.stdout, result.stderr)
