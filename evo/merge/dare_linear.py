"""DARE (arXiv 2311.03099): drop elements of task vectors at random and rescale the rest."""

from collections.abc import Sequence

from torch import Tensor

from evo.merge import Method
from evo.merge.task_vectors import DENSITY, LAMBDA, copy_of_sparse, fuse, switch


def dare(
    donors: Sequence[Tensor],
    base: Tensor,
    coefficients: Sequence[float],
    *,
    noise: Sequence[Tensor],
    density: Sequence[float],
    rescale: float,
    normalize: float,
    lambda_: float,
    elect: bool = False,
) -> Tensor:
    """Base + lambda * sum_d w_d m_d tau_d / (1 - p), m_d ~ Bernoulli(1 - p), 1 - p = density.

    So the expectation is that of task arithmetic. An element is kept where its noise is below the density: as a
    density grows, elements join the mask and none leaves it.
    """
    taus = [
        _drop(donor - base, uniform, rho, bool(rescale))
        for donor, uniform, rho in zip(donors, noise, density, strict=True)
    ]
    return fuse(base, taus, coefficients, elect=elect, normalize=normalize, lambda_=lambda_)


def _drop(tau: Tensor, noise: Tensor, density: float, rescale: bool) -> Tensor:
    tau.mul_(noise.lt_(density))
    return tau.mul_(1.0 / density) if rescale and density > 0.0 else tau


DARE_LINEAR = Method(
    dare,
    copy_of=copy_of_sparse,
    knobs={"density": DENSITY, "rescale": switch(True), "normalize": switch(False), "lambda": LAMBDA},
    random=True,
    from_ancestor=True,
)
