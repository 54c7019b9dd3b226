"""A folder that is there whole or not at all: written beside its place, and moved there at the end."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def free_disk(out: Path) -> int:
    """Bytes free on the disk where a folder is, or will be."""
    return shutil.disk_usage(next(folder for folder in (out, *out.resolve().parents) if folder.is_dir())).free


@contextmanager
def beside(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A fresh folder next to `out` that takes its place if the block succeeds, and is removed if not.

    It is locked while it is written to, so that one which `kill -9` has left behind is known, and removed.

    Args:
        out: what is not there yet, or an empty folder.
        replace: let it be a folder that is not empty.

    Raises:
        OSError: if it cannot be written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.mergefront-"
    for left in out.parent.glob(f"{glob.escape(prefix)}*"):
        with suppress(FileNotFoundError), _locked(left) as is_nobodys:
            if is_nobodys:
                shutil.rmtree(left, ignore_errors=True)
    begun = Path(tempfile.mkdtemp(prefix=f".{out.name}.begun-", dir=out.parent))
    folder = begun.with_name(begun.name.replace(f".{out.name}.begun-", prefix))
    try:
        with _locked(begun):
            begun.rename(folder)  # only now: under that name, not locked, another would take it for one left behind
            yield folder
            folder.chmod(0o755)
            for file in folder.iterdir():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
            if out.is_dir() and replace:
                _replace(out, folder)
            else:
                folder.rename(out)  # onto nothing, or onto an empty folder
    finally:
        for ours in (begun, folder):
            shutil.rmtree(ours, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether nobody else has locked a folder. The lock ends with the block, or with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_nobodys = True
        except OSError:  # somebody has, or the disk knows no locks
            is_nobodys = False
        yield is_nobodys
    finally:
        os.close(descriptor)


def _replace(out: Path, folder: Path) -> None:
    """Move a folder to where another is. What was there gets its name: whoever is killed removing it, leaves it to the
    next.
    """
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    try:
        out.rename(old / "was")
        folder.rename(out)
        old.rename(folder)
    finally:  # also if it is interrupted between the two
        if not out.exists():
            with suppress(FileNotFoundError):  # another is replacing it, too, and has it
                (old / "was").rename(out)
        shutil.rmtree(old, ignore_errors=True)
