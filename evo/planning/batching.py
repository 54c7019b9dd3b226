"""What a batch that is refilled costs: from the lengths of its answers, and from tries that were timed.

A step of the batch takes a while, each row in it some more, and attention more again: every row is padded to the
longest. So a few answers that run on make all others dear as long as rows are refilled, which no try shows that ends
when they do.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

BETTER = 0.5
"""Attention is reckoned with where the misfit is less than this share of what it is without."""


def work(lengths: Sequence[int], rows: int) -> NDArray[np.float64]:
    """What is done to write answers.

    Args:
        lengths: tokens of each, in the order in which they are begun.
        rows: answers that are written together; one that ends makes room for the next.

    Returns:
        calls (1), steps, rows summed over steps, and rows times tokens of the longest summed over steps.
    """
    now = n_steps = row_steps = attended = begun = 0
    ends: list[int] = []
    running: list[tuple[int, int]] = []  # by start; those that have ended are dropped when they come to the top
    while begun < len(lengths) or ends:
        while begun < len(lengths) and len(ends) < rows:
            end = now + max(1, lengths[begun])
            heapq.heappush(ends, end)
            heapq.heappush(running, (now, end))
            begun += 1
        while running[0][1] <= now:
            heapq.heappop(running)
        d, longest = ends[0] - now, now - running[0][0]
        n_steps, row_steps = n_steps + d, row_steps + d * len(ends)
        attended += len(ends) * (d * longest + d * (d + 1) // 2)
        now = ends[0]
        while ends and ends[0] == now:
            heapq.heappop(ends)
    return np.array([1, n_steps, row_steps, attended], np.float64)


def prices(done: Sequence[NDArray[np.float64]], seconds: Sequence[float]) -> NDArray[np.float64]:
    """Seconds of a unit of each kind of work, none below 0: least squares, longer tries counting more.

    Args:
        done: the work of each try.
        seconds: that it took.
    """
    weights = 1.0 / np.sqrt(np.maximum(seconds, 1e-9))
    took = np.asarray(seconds) * weights
    every = np.stack(done) * weights[:, None]
    scale = np.maximum(np.linalg.norm(every, axis=0), 1e-12)
    plain, without = nnls(every[:, :3] / scale[:3], took)
    full, with_attention = nnls(every / scale, took)
    chosen = full if with_attention < BETTER * without - 1e-9 * np.linalg.norm(took) else np.append(plain, 0.0)
    return np.asarray(chosen / scale)
