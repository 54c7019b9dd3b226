"""Linear interpolation between a base and any number of donors (model soups, arXiv 2203.05482; AoE's
lambda-weighted average, arXiv 2506.14794).
"""

from collections.abc import Sequence

from torch import Tensor

from evo.merge import Method, one_hot
from evo.merge.task_vectors import weighted_sum


def linear(donors: Sequence[Tensor], base: Tensor, coefficients: Sequence[float]) -> Tensor:
    """(1 - sum_d c_d) * base + sum_d c_d * donor_d: what donors leave over is the base's share."""
    return weighted_sum([base, *donors], [1.0 - sum(coefficients), *coefficients])


LINEAR = Method(linear, copy_of=one_hot, is_mixture=True)
