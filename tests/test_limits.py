"""Limits of control groups: as files say them, and as a process meets one."""

import os
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from fitness.engines.limits import GROUPS, Limit, limits

GB = 10**9
UNLIMITED = 9223372036854771712
"""What version 1 says where there is no limit."""


def group(folder, version, most, used, cached):
    """The files of one control group."""
    most_file, used_file, prefix = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"), 2: ("memory.max", "memory.current", "")
    }[version]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / most_file).write_text(f"{most}\n")
    (folder / used_file).write_text(f"{used}\n")
    stat = {"anon": used - cached, "inactive_file": 7, "active_file": 9, "total_inactive_file": 11}
    stat |= {f"{prefix}inactive_file": cached - cached // 4, f"{prefix}active_file": cached // 4}
    (folder / "memory.stat").write_text("".join(f"{key} {value}\n" for key, value in stat.items()))


def found(folder, membership):
    (folder / "membership").write_text(membership)
    return list(limits(folder / "groups", folder / "membership"))


def test_of_a_slurm_job_and_what_is_around_it(tmp_path):
    groups = tmp_path / "groups"
    group(groups / "system.slice/job_7/step_0", 2, "max", 3 * GB, GB)
    group(groups / "system.slice/job_7", 2, 64 * GB, 5 * GB, 2 * GB)
    group(groups / "system.slice", 2, 200 * GB, 90 * GB, 40 * GB)
    group(groups / "system.slice/job_8", 2, GB, GB, 0)  # somebody else's
    expected = [Limit(64 * GB, 3 * GB), Limit(200 * GB, 50 * GB)]
    assert found(tmp_path, "0::/system.slice/job_7/step_0\n") == expected


def test_of_a_container_that_sees_itself_as_the_root(tmp_path):
    group(tmp_path / "groups", 2, 16 * GB, 4 * GB, GB)
    assert found(tmp_path, "0::/\n") == [Limit(16 * GB, 3 * GB)]
    assert found(tmp_path, "0::/docker/4f2a:0\n") == [Limit(16 * GB, 3 * GB)]


def test_of_version_1(tmp_path):
    group(tmp_path / "groups" / "memory" / "docker", 1, 8 * GB, 2 * GB, GB)
    group(tmp_path / "groups" / "memory", 1, UNLIMITED, 30 * GB, 20 * GB)
    membership = "9:name=systemd:/docker\n4:memory,hugetlb:/docker\n3:cpuset:/\n0::/\n"
    assert found(tmp_path, membership) == [Limit(8 * GB, GB), Limit(UNLIMITED, 10 * GB)]


@pytest.mark.parametrize("membership", ["", "0::/\n", "4:memory:/a\n", "0::/../../etc\n"])
def test_where_there_are_none(membership, tmp_path):
    (tmp_path / "memory.max").write_text("5\n")  # outside
    assert found(tmp_path, membership) == []
    assert list(limits(tmp_path, tmp_path / "nothing")) == []


def test_a_process_knows_how_much_it_may_have():
    """A real group of 3 GB, where this machine lets one be made."""
    name = f"mergefront-{uuid.uuid4().hex[:8]}"
    for parent, file in ((GROUPS / "memory", "memory.limit_in_bytes"), (GROUPS, "memory.max")):
        folder = parent / name
        with suppress(OSError):
            folder.mkdir()
            try:
                (folder / file).write_text(str(3 * GB))
                _check_within(folder)
                return
            finally:
                folder.rmdir()
    pytest.skip("control groups cannot be made here")


def _check_within(folder):
    code = (
        "import os, pathlib, sys, torch\n"
        "pathlib.Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()))\n"
        "from fitness.engines.memory import free_bytes, total_bytes\n"
        "cpu = torch.device('cpu'); print(total_bytes(cpu), free_bytes(cpu))\n"
        "held = torch.ones(250_000_000); print(free_bytes(cpu))\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root, env={**os.environ})
    total, before, after = map(int, done.stdout.split())
    assert total == pytest.approx(3 * GB, abs=1 << 16)
    assert before <= total and before - after == pytest.approx(GB, rel=0.05)
