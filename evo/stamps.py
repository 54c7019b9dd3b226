"""What shows at once, without reading a byte, that files have been written to or replaced while they were used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from evo.checkpoint import Checkpoint

_Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Stamps:
    """Files as they were: each one's size in bytes, time of its last change in nanoseconds, and inode."""

    of_files: Mapping[Path, _Stamp | None]

    @classmethod
    def of_weights(cls, checkpoints: Iterable[Checkpoint]) -> Stamps:
        """Those of the files that the tensors of checkpoints are in."""
        return cls({file: _stamp(file) for checkpoint in checkpoints for file in checkpoint.weight_files()})

    def changed(self) -> list[Path]:
        """Files that are not as they were, or not there any more."""
        return [file for file, stamp in self.of_files.items() if _stamp(file) != stamp]


def _stamp(file: Path) -> _Stamp | None:
    """None if it is not there."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
