"""Passthrough: each tensor whole from one source, times a scale (mergekit's method, for stacking layers)."""

from collections.abc import Sequence

from torch import Tensor

from evo.merge import Knob, Method


def passthrough(donors: Sequence[Tensor], base: Tensor, coefficients: Sequence[float], *, scale: float) -> Tensor:
    """Scale * W of the donor with the largest coefficient, if that is at least 1/2, else of the base.

    Searched with a coefficient for each block or expert, it picks each from one of the parents, unmixed.
    """
    return [base, *donors][_chosen(coefficients)] * scale


def _chosen(coefficients: Sequence[float]) -> int:
    best = max(range(len(coefficients)), key=lambda d: coefficients[d])
    return best + 1 if coefficients[best] >= 0.5 else 0


def _copy_of(coefficients: Sequence[float], *, scale: float) -> int | None:
    return _chosen(coefficients) if scale == 1.0 else None


PASSTHROUGH = Method(passthrough, copy_of=_copy_of, knobs={"scale": Knob(1.0, -10.0, 10.0)})
