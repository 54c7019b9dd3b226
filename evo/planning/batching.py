"""What a batch costs that is refilled, or not: from the lengths of its answers, and from tries that were timed.

A call takes a while, a step of the batch some more, each row in it and each prompt more again; and so does attention:
every row is padded to the longest. Which rows are decoded together is what the engine's own schedule says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from fitness.engines.levels import Levels, lowest_level

ALWAYS, IF_NEEDED = (0, 2, 3), ((), (4,), (1,), (4, 1))
"""Kinds of work that are reckoned with: calls, steps and rows; and attention and prompts, which tries may not tell from
these.
"""
BETTER = 0.8
"""A kind is needed where the misfit with it is less than this share of what it is without."""


@dataclass(frozen=True)
class Batch:
    """Answers that are decoded together."""

    rows: int
    """At most."""
    prompt: int = 1
    """Tokens of a prompt."""
    model_bytes: int = 0
    token_bytes: int = 1
    """Of a token's keys and values."""
    refilled: bool = True
    """Or else a batch goes on until its longest answer has ended, as that of a model with recurrent states."""

    def work(self, lengths: Sequence[int], most: int) -> NDArray[np.float64]:
        """What is done to write answers.

        Args:
            lengths: tokens of each, in the order in which they are begun.
            most: that they may have.

        Returns:
            calls (1), prompts, steps, rows summed over steps, and rows times tokens of the longest summed over steps.
        """
        if not self.refilled:
            return self._work_in_turns(lengths)
        total, written = np.maximum(1, lengths), np.zeros(len(lengths), np.int64)
        lowest = lowest_level(self.model_bytes, self.rows, self.token_bytes)
        others = Levels([self.prompt] * len(lengths), self.rows, self.prompt + most, lowest)
        inside = np.zeros(0, np.int64)  # the batch
        n_steps = row_steps = attended = 0
        while others.anyone or len(inside):
            joining = others.join(len(inside))
            new = np.array(joining.fresh or joining.parked, np.int64)
            inside = np.append(inside, new)
            if joining.parked:
                continue
            stepping, d = new, 1  # a pass over prompts writes a token, too
            if not joining.fresh:
                stepping, d = inside, int((total - written)[inside].min())
                if others.anyone:
                    d = min(d, others.limit + 1 - self.prompt - int(written[inside].max()))
            longest = self.prompt + int(written[stepping].max())
            n_steps, row_steps = n_steps + d, row_steps + d * len(stepping)
            attended += len(stepping) * (d * longest + d * (d + 1) // 2)
            written[stepping] += d
            ended = written[inside] >= total[inside]
            for i in inside[ended]:
                others.end(int(total[i]))
            inside = inside[~ended]
            outgrown = others.outgrown((self.prompt + written[inside]).tolist())
            for i in inside[outgrown]:
                others.park(int(i), self.prompt + int(written[i]))
            inside = np.delete(inside, outgrown)
        return np.array([1, len(lengths), n_steps, row_steps, attended], np.float64)

    def _work_in_turns(self, lengths: Sequence[int]) -> NDArray[np.float64]:
        """The same of one batch after the other."""
        n_steps = row_steps = attended = 0
        for start in range(0, len(lengths), self.rows):
            batch = lengths[start : start + self.rows]
            longest = max(1, *batch)
            n_steps, row_steps = n_steps + longest, row_steps + len(batch) * longest
            attended += len(batch) * (longest * self.prompt + longest * (longest + 1) // 2)
        return np.array([1, len(lengths), n_steps, row_steps, attended], np.float64)


def prices(done: Sequence[NDArray[np.float64]], seconds: Sequence[float]) -> NDArray[np.float64]:
    """Seconds of a unit of each kind of work, none below 0: least squares, longer tries counting more.

    Args:
        done: the work of each try.
        seconds: that it took.
    """
    weights = 1.0 / np.sqrt(np.maximum(seconds, 1e-9))
    every, took = np.stack(done) * weights[:, None], np.asarray(seconds) * weights
    scale = np.maximum(np.linalg.norm(every, axis=0), 1e-12)
    each, least, nothing = np.zeros(len(scale)), np.inf, 1e-9 * float(np.linalg.norm(took))
    for more in IF_NEEDED:
        kinds = [*ALWAYS, *more]
        found, misfit = nnls(every[:, kinds] / scale[kinds], took)
        if (handicapped := (misfit + nothing) / BETTER ** len(more)) < least:
            each, least = np.zeros(len(scale)), handicapped
            each[kinds] = found / scale[kinds]
    return each
