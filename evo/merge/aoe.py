"""Assembly of Experts (arXiv 2506.14794), from which R1T-Chimera came: interpolate the tensors that differ."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from evo.merge import Knob, Measure, Method, Stats, base_at_zero, one_hot
from evo.merge.blocks import Block
from evo.merge.linear import linear
from evo.merge.statistics import exact_sum, peak


def aoe(
    donors: Sequence[Tensor], base: Tensor, coefficients: Sequence[float], *, stats: Sequence[Stats], delta: float
) -> Tensor:
    """The lambda-weighted average, sum_i lambda_i W_i with lambda_1 = 1 - sum_d c_d of the base W_1, where
    max_i ||W_i - W_1||_F / sqrt(numel) > delta; the base elsewhere. Which tensors may be merged at all (all, or
    the routed experts) is for the recipe's rules to say.
    """
    copied = _copy_once_measured(coefficients, stats=stats, delta=delta)
    return linear(donors, base, coefficients) if copied is None else [base, *donors][copied].clone()


def _copy_once_measured(coefficients: Sequence[float], *, stats: Sequence[Stats], delta: float) -> int | None:
    return one_hot(coefficients) if max(s.whole for s in stats) > delta else 0


def distance(donors: Sequence[Tensor], base: Tensor) -> Stats:
    """||W_i - W_1||_F / sqrt(numel): the root mean square of a donor's difference from the base."""
    (donor,) = donors

    def squares(block: Block) -> Tensor:
        return (donor[block].double() - base[block]).square_()

    return Stats((float(exact_sum(squares, base, peak(squares, base))) / max(1, base.numel())) ** 0.5)


AOE = Method(
    aoe,
    copy_of=base_at_zero,
    knobs={"delta": Knob(0.0, 0.0, 1.0)},
    measure=Measure(distance, per_donor=True),
    copy_once_measured=_copy_once_measured,
)
