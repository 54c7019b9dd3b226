"""Model Breadcrumbs (arXiv 2312.06795): task vectors without their smallest elements and their outliers."""

from collections.abc import Sequence

from torch import Tensor

from evo.merge import Method, Stats
from evo.merge.task_vectors import (
    DENSITY,
    GAMMA,
    LAMBDA,
    TOP_WITHOUT_OUTLIERS,
    copy_of_sparse,
    fuse,
    keep_within,
    range_at,
    switch,
)


def breadcrumbs(
    donors: Sequence[Tensor],
    base: Tensor,
    coefficients: Sequence[float],
    *,
    stats: Sequence[Stats],
    density: Sequence[float],
    gamma: Sequence[float],
    normalize: float,
    lambda_: float,
    elect: bool = False,
) -> Tensor:
    """Base + lambda * sum_d w_d m_d tau_d.

    The mask m_d drops the share `gamma` of the tensor that is largest in magnitude and as much of the smallest
    as leaves the share `density`. Where density + gamma > 1 fewer outliers are dropped. At density 1 none are.
    """
    taus = [
        keep_within(donor - base, *range_at(measured, rho))
        for donor, measured, rho in zip(donors, stats, density, strict=True)
    ]
    return fuse(base, taus, coefficients, elect=elect, normalize=normalize, lambda_=lambda_)


BREADCRUMBS = Method(
    breadcrumbs,
    copy_of=copy_of_sparse,
    knobs={"density": DENSITY, "gamma": GAMMA, "normalize": switch(False), "lambda": LAMBDA},
    measure=TOP_WITHOUT_OUTLIERS,
    from_ancestor=True,
)
