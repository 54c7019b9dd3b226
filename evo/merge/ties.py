"""TIES-Merging (arXiv 2306.01708): trim, elect signs, merge what agrees."""

from collections.abc import Sequence

from torch import Tensor

from evo.merge import Method, Stats
from evo.merge.task_vectors import DENSITY, LAMBDA, TOP, copy_of_sparse, fuse, keep_from, range_at, switch


def ties(
    donors: Sequence[Tensor],
    base: Tensor,
    coefficients: Sequence[float],
    *,
    stats: Sequence[Stats],
    density: Sequence[float],
    normalize: float,
    lambda_: float,
) -> Tensor:
    """Algorithm 1 of the paper, with a weight for each donor.

    1. Trim: keep the share `density` of each tau_d = donor_d - base that is largest in magnitude.
    2. Elect: gamma = sgn(sum_d w_d tau_d), per element.
    3. Merge: average, with weights, the tau_d whose sign is gamma; add lambda times it to the base.
    """
    taus = [
        keep_from(donor - base, range_at(measured, rho)[0])
        for donor, measured, rho in zip(donors, stats, density, strict=True)
    ]
    return fuse(base, taus, coefficients, elect=True, normalize=normalize, lambda_=lambda_)


TIES = Method(
    ties,
    copy_of=copy_of_sparse,
    knobs={"density": DENSITY, "normalize": switch(True), "lambda": LAMBDA},
    measure=TOP,
    from_ancestor=True,
)
