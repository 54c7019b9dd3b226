"""Files that are written to, replaced or removed are noticed; files that are only read are not."""

from __future__ import annotations

import os
import shutil

import pytest

from evo.checkpoint import Checkpoint
from evo.stamps import Stamps
from tests.conftest import PARENTS


def _write(file):
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")


def _truncate(file):
    os.truncate(file, file.stat().st_size - 1)


def _replace(file):
    """With the same bytes and times, as `rsync -t` does: what is mapped is another file from then on."""
    other, status = file.with_suffix(".new"), file.stat()
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(file)


@pytest.mark.parametrize("change", [_write, _truncate, _replace, os.remove])
def test_a_change(tmp_path, change):
    folders = [shutil.copytree(PARENTS / name, tmp_path / name) for name in ("reasoner", "concise")]
    stamps = Stamps.of_weights(map(Checkpoint.open, folders))
    file = next(folders[1].glob("*.safetensors"))
    file.read_bytes()
    (folders[0] / "README.md").write_text("no weights\n")
    assert stamps.changed() == []
    change(file)
    assert stamps.changed() == [file]
