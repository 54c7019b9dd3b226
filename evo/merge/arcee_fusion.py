"""Arcee Fusion (mergekit's method): take over the donor's most important elements only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evo.merge import Measure, Method, Stats, base_at_zero
from evo.merge.blocks import Block
from evo.merge.statistics import BLOCK_ELEMENTS, order_statistics
from evo.merge.task_vectors import weighted_sum

_EPS = 1e-8


def arcee_fusion(
    donors: Sequence[Tensor], base: Tensor, coefficients: Sequence[float], *, stats: Sequence[Stats]
) -> Tensor:
    """Base + sum_d c_d [s_d >= theta_d] tau_d, with the importance s_d = |tau_d| * KL_d of an element.

    KL is the divergence of the donor's row from the base's, both as softmax. The threshold theta is the
    median of s plus 1.5 times its interquartile range. One donor with coefficient 1 gives the original.
    """
    return weighted_sum([_fused(d - base, s) for d, s in zip(donors, stats, strict=True)], coefficients).add_(base)


def _fused(tau: Tensor, stats: Stats) -> Tensor:
    assert stats.rows is not None
    importance = tau.abs().mul_(stats.rows)
    return tau.mul_(importance.ge_(stats.whole))


def threshold(donors: Sequence[Tensor], base: Tensor) -> Stats:
    """Theta of the whole part, and the divergence of each row, float32 (R, 1)."""
    (donor,) = donors
    if not base.numel():
        return Stats(0.0, torch.zeros(base.shape[0], 1, device=base.device))
    height = max(1, BLOCK_ELEMENTS // max(1, base.shape[1]))
    divergence = torch.cat(
        [_divergence(donor[i : i + height], base[i : i + height]) for i in range(0, base.shape[0], height)]
    )

    def importance(block: Block) -> Tensor:
        return (donor[block].float() - base[block].float()).abs_().mul_(divergence[block[0]])

    ranks = [int(q * (base.numel() - 1)) for q in (0.25, 0.5, 0.75)]
    low, median, high = order_statistics(importance, base, ranks)
    return Stats(median + 1.5 * (high - low), divergence)


def _divergence(donor: Tensor, base: Tensor) -> Tensor:
    """KL(softmax(donor) || softmax(base)) of whole rows, shape (r, 1)."""
    p, q = (torch.softmax(x.double(), dim=1) + _EPS for x in (donor, base))
    return (p * (p / q).log_()).sum(1, keepdim=True).clamp_min_(0.0).float()


ARCEE_FUSION = Method(arcee_fusion, copy_of=base_at_zero, measure=Measure(threshold, per_donor=True))
