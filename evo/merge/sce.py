"""SCE (FuseChat, arXiv 2408.07990): select, calculate, erase."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from evo.merge import Knob, Measure, Method, Stats, base_at_zero
from evo.merge.blocks import Block, blocks
from evo.merge.statistics import BLOCK_ELEMENTS, exact_sum, order_statistics, peak
from evo.merge.task_vectors import at_least_something, elected_sign, total_of, weighted_sum


def sce(
    donors: Sequence[Tensor], base: Tensor, coefficients: Sequence[float], *, stats: Stats, select_topk: float
) -> Tensor:
    """Base + sum_d c_d eta_d tau'_d / sum_d eta_d, over the donors whose sign is elected.

    1. Select: tau' keeps the share `select_topk` of the elements that varies most between the donors.
    2. Calculate: eta_d = sum(tau'_d^2) / sum_e sum(tau'_e^2).
    3. Erase: donors whose sign is not that of sum_d tau'_d are left out of an element.

    All coefficients 1 give the paper's merge; c_d scales what donor d adds to it.
    """
    threshold, shares = stats.whole
    taus = _select([donor - base for donor in donors], threshold)
    sign = elected_sign(taus)
    agreeing = [tau.mul_(sign).clamp_min_(0.0) for tau in taus]
    merged = weighted_sum(agreeing, [c * share for c, share in zip(coefficients, shares, strict=True)])
    merged /= at_least_something(weighted_sum([x.gt_(0.0) for x in agreeing], shares), shares)
    return merged.mul_(sign).add_(base)


def _select(taus: list[Tensor], threshold: float) -> list[Tensor]:
    if threshold <= 0.0:
        return taus
    chosen = _variance(taus).ge_(threshold)
    return [tau * chosen for tau in taus]


def _variance(taus: Sequence[Tensor]) -> Tensor:
    """Population variance over the donors."""
    mean = total_of(taus).mul_(1.0 / len(taus))
    return total_of([(tau - mean).square_() for tau in taus]).mul_(1.0 / len(taus))


def selection(donors: Sequence[Tensor], base: Tensor, *, select_topk: float) -> Stats:
    """The smallest variance that is selected, and each donor's share eta of the selected energy."""

    def taus(block: Block) -> list[Tensor]:
        return [donor[block].float() - base[block].float() for donor in donors]

    threshold = _threshold(lambda block: _variance(taus(block)), base, select_topk)

    def energy(d: int) -> Callable[[Block], Tensor]:
        return lambda block: _select(taus(block), threshold)[d].double().square_()

    energies = [float(exact_sum(energy(d), base, peak(energy(d), base))) for d in range(len(donors))]
    total = sum(energies)
    shares = [e / total for e in energies] if total else [1.0 / len(donors)] * len(donors)
    return Stats((threshold, shares))


def _threshold(variance: Callable[[Block], Tensor], base: Tensor, share: float) -> float:
    """A share of the elements that vary at all has a variance from here on."""
    if share >= 1.0:
        return 0.0
    varying = sum(int(torch.count_nonzero(variance(block))) for block in blocks(base, BLOCK_ELEMENTS))
    chosen = int(varying * share)
    return order_statistics(variance, base, [base.numel() - chosen])[0] if chosen else math.inf


SCE = Method(
    sce,
    copy_of=base_at_zero,
    knobs={"select_topk": Knob(1.0, 0.0, 1.0, step=1.0 / 128)},
    measure=Measure(selection, ("select_topk",)),
    from_ancestor=True,
)
