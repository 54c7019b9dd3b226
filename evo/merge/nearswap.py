"""NearSwap (A. Monaco, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001): adopt what is near anyway."""

from collections.abc import Sequence

from torch import Tensor

from evo.merge import Knob, Method
from evo.merge.task_vectors import weighted_sum


def nearswap(donors: Sequence[Tensor], base: Tensor, coefficients: Sequence[float], *, t: float) -> Tensor:
    """Base + sum_d c_d clip(donor_d - base, -t, t).

    The rule is written w b + (1 - w) a with w = min(1, t / |b - a|); w (b - a) is the clipped difference. A
    coefficient of 1 and one donor give it.
    """
    return weighted_sum([(donor - base).clamp_(-t, t) for donor in donors], coefficients).add_(base)


def _copy_of(coefficients: Sequence[float], *, t: float) -> int | None:
    return 0 if t == 0.0 or not any(coefficients) else None


NEARSWAP = Method(nearswap, copy_of=_copy_of, knobs={"t": Knob(1e-4, 0.0, 1.0)})
