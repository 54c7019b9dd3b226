"""The same bytes as safetensors' own writer, whatever the order."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from evo.encodings import TensorHeader
from evo.safetensors_writer import SafetensorsWriter

TENSORS = {
    "z.weight": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "a.scale": torch.tensor(2.5),
    "b.numbers": torch.arange(7, dtype=torch.float32).to(torch.float8_e4m3fn),
    "c.empty": torch.empty(0, 4, dtype=torch.float16),
    "d.bytes": torch.arange(5, dtype=torch.uint8),
    "é": torch.arange(3, dtype=torch.int64),
}
NAMES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int64: "I64",
}
HEADERS = {name: TensorHeader(NAMES[t.dtype], tuple(t.shape)) for name, t in TENSORS.items()}


@pytest.mark.parametrize("order", [sorted(TENSORS), sorted(TENSORS, reverse=True)])
def test_bytes_of_the_library(order, tmp_path):
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    writer = SafetensorsWriter(tmp_path / "ours", HEADERS)
    for name in order:
        writer.write(name, TENSORS[name])
    assert writer.close()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_file_that_does_not_fit_is_closed(tmp_path):
    """Open, it would take up its part of a full disk as long as the process lives."""
    with pytest.raises(OSError, match=r"large|space"):
        SafetensorsWriter(tmp_path / "ours", {"a": TensorHeader("F32", (1 << 58,))})
    descriptors = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert tmp_path / "ours" not in [link.readlink() for link in descriptors]


def test_an_incomplete_file_is_told(tmp_path):
    writer = SafetensorsWriter(tmp_path / "ours", HEADERS)
    writer.write("a.scale", TENSORS["a.scale"])
    assert not writer.close()
