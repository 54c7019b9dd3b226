"""An anytime-valid test that a candidate's losses do not stay below a bar, from problems drawn one after another.

A finite population of problems has losses x_j >= 0 that are seen one by one. The null hypothesis is
sum_j x_j <= B: the candidate passes the bar. Let R be the problems that remain before a draw, S the losses seen,
and problem k come from R with probability q_k = w_k / sum_R w. For any h_j known beforehand (here 0, or what the
model that set the bar lost on problem j: the paired comparison),

    Z = sum_R h + (x_k - h_k) / q_k        has the conditional mean  sum_R x  <=  B - S  under the null,
    Z >= z = sum_R h - (sum_R w) max_R (h / w),

    W_k = W_{k-1} (1 + lambda (Z - (B - S)) / ((B - S) - z)),    0 <= lambda < 1,

so W is a nonnegative supermartingale and P(some W_k >= 1/alpha) <= alpha, however often one looks (Ville). This
is betting on a mean (Waudby-Smith and Ramdas, arXiv 2010.09686, section 5: without replacement), with weighted
draws and control variates (Shekhar, Xu, Lipton, Liang and Ramdas, arXiv 2305.06884). The stake is divided evenly
over several lambdas, with h and without, so that nothing needs tuning. S above B refutes the null for certain.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BETS = np.array([0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
"""The lambdas."""


def evidence(losses: Floats, weights: Floats, bars: Floats, paired: Floats) -> Floats:
    """The largest wealth so far against each of K bars, >= 1; infinite where the bar cannot be passed any more.

    Args:
        losses: x on the problems drawn so far, in order, (n,).
        weights: w of all problems in the order of the draw, > 0, (N,) with N >= n.
        bars: B of each bar, (K,).
        paired: h for each bar, in the order of the draw, >= 0, (K, N).
    """
    impossible = losses.sum() > bars
    if not len(losses):
        return np.where(impossible, np.inf, 1.0)
    wealth = (_wealth(losses, weights, bars, paired) + _wealth(losses, weights, bars, np.zeros_like(paired))) / 2
    best = np.maximum(1.0, wealth.max(axis=1))
    return np.where(impossible, np.inf, best)


def _wealth(losses: Floats, weights: Floats, bars: Floats, h: Floats) -> Floats:
    """W after each draw, averaged over the lambdas, (K, n)."""
    n = len(losses)
    w_left = _sum_from(weights)[:n]
    h_left = _sum_from(h)[:, :n]
    lowest = h_left - w_left * _max_from(h / weights)[:, :n]
    room = bars[:, None] - np.concatenate([[0.0], np.cumsum(losses)])[:-1]  # (K, n)
    z = h_left + (losses - h[:, :n]) * w_left / weights[:n]
    open_ = room > np.maximum(lowest, 0.0)  # else no bet: the sum of losses tells when the null is impossible
    gain = np.where(open_, (z - room) / np.where(open_, room - lowest, 1.0), 0.0)
    return np.asarray(np.cumprod(1.0 + BETS[:, None, None] * gain, axis=2).mean(axis=0))


def _sum_from(values: Floats) -> Floats:
    """Sum of each value and all after it."""
    return np.asarray(np.cumsum(values[..., ::-1], axis=-1)[..., ::-1])


def _max_from(values: Floats) -> Floats:
    """Largest of each value and all after it."""
    return np.asarray(np.maximum.accumulate(values[..., ::-1], axis=-1)[..., ::-1])
