"""How much memory a container or a batch job may have: the limits of Linux's control groups, which /proc/meminfo does
not know of. Whoever goes beyond one is killed.

Documented at https://docs.kernel.org/admin-guide/cgroup-v2.html (version 2) and .../cgroup-v1/memory.html (version 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Limit:
    """Of one group that this process is in."""

    most: int
    """Bytes that its processes may have together."""
    used: int
    """Bytes that they have, but for cached files, which make room."""


def limits(groups: Path = GROUPS, membership: Path = MEMBERSHIP) -> Iterator[Limit]:
    """The limits that this process is under; none where there are no control groups.

    Args:
        groups: where control groups are mounted.
        membership: which of them this process is in: lines of "number:controllers:path", the path of version 2 in one
            without controllers.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in lines:
        if not controllers:
            yield from _of_each(groups, path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            yield from _of_each(groups / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def _of_each(mount: Path, path: str, most: str, used: str, prefix: str) -> Iterator[Limit]:
    """Of a group and those around it. In a container some of the path may be out of sight."""
    group = mount / path.strip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(mount):
            return
        try:
            said = (folder / most).read_text().strip()
            if said == "max":
                continue
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(stat[prefix + "active_file"]) + int(stat[prefix + "inactive_file"])
            yield Limit(int(said), int((folder / used).read_text()) - cached)
        except (OSError, KeyError, ValueError):  # out of sight, or not under control
            continue
