"""Who works on a run, as others see it: looking disturbs nobody, and needs no right to write."""

import fcntl
import re
import shutil
import subprocess
import sys

import pytest

from evo.run_folder import LOCK_FILE, BusyError, hold, is_held

READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && ! touch "$0/x" 2>/dev/null && exec "$@"'
LOOK = "import sys, pathlib; from evo.run_folder import is_held; print(is_held(pathlib.Path(sys.argv[1])))"


def test_a_run_is_held_while_the_block_lasts(tmp_path):
    assert not is_held(tmp_path / "run") and not (tmp_path / "run").exists()
    with hold(tmp_path / "run"):
        assert is_held(tmp_path / "run")
    assert not is_held(tmp_path / "run")


def test_the_command_that_ends_it_can_be_pasted(tmp_path):
    folder = tmp_path / "my run"
    with hold(folder), pytest.raises(BusyError, match=re.escape(f"`mergefront stop '{folder}'`")), hold(folder):
        pass


def test_who_looks_is_not_taken_for_one_who_works(tmp_path):
    with hold(tmp_path):
        pass
    with open(tmp_path / LOCK_FILE, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # another one, in the middle of a look
        assert not is_held(tmp_path)


def test_a_folder_that_cannot_be_written_is_answered(tmp_path):
    with hold(tmp_path):
        pass
    mounted = ["unshare", "-m", "sh", "-c", READ_ONLY, str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("only root may mount a folder read-only")
    look = [*mounted, sys.executable, "-c", LOOK, str(tmp_path)]
    assert subprocess.run(look, capture_output=True, text=True).stdout == "False\n"
    with hold(tmp_path):
        assert subprocess.run(look, capture_output=True, text=True).stdout == "True\n"
