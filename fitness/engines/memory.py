"""How many sequences find room beside a model: the batch size that "auto" stands for."""

from __future__ import annotations

from pathlib import Path

import torch

from fitness.engines.limits import limits

SHARE = {"cpu": 0.5, "cuda": 0.8}
"""Of the free memory, how much a batch may take."""
MOST = {"cpu": 128, "cuda": 512}
"""Rows beyond which throughput hardly grows."""
ROW_LOGIT_BYTES = 32
"""Of a token of the vocabulary, for every row: float64 copies of logits."""
BUFFER_FACTOR = 2.5
"""Of what is in use: a buffer of the cache grows to half as large again, and the old one is there while it does."""


def missing_gpu(device: torch.device) -> str | None:
    """What there is instead of a GPU; None where it is there, or none is meant."""
    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type != "cuda" or (device.index or 0) < n:
        return None
    return f"GPUs 0 to {n - 1} only" if n > 1 else "GPU 0 only" if n else "no GPU"


def free_bytes(device: torch.device) -> int:
    """Memory that can still be used on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, min([_host_bytes("MemAvailable"), *(limit.most - limit.used for limit in limits())]))


def total_bytes(device: torch.device) -> int:
    """Memory that a device has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return min([_host_bytes("MemTotal"), *(limit.most for limit in limits())])


def _host_bytes(name: str) -> int:
    """What the system says of the machine's memory."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines[name].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return 4 * 2**30


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind; 0 where that cannot be told."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["RssAnon"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return 0


def rows_that_fit(row_bytes: int, n_free: int, device: torch.device) -> int:
    """The largest power of two of rows of so many bytes that fits, and at least 1."""
    n = int(SHARE.get(device.type, 0.5) * n_free / (BUFFER_FACTOR * row_bytes))
    n = max(1, min(n, MOST.get(device.type, 128)))
    return 1 << (n.bit_length() - 1)
