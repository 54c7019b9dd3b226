"""MAGPRUNE of DELLA (arXiv 2406.11617, section 3.1): elements are kept by chance, the larger the likelier.

One operation to compiled loops: what is done here on tensors, cpp.py and triton_kernel.py do with the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

N_BUCKETS = 64  # 4 an octave, from 2^-10 to 2^6: tables of them fit into registers
UNIT = 32.0  # magnitudes that count as 1: with it the buckets' exponents end in 0000 to 1111
_SHIFT = 21  # leaves an element's exponent and two bits of its fraction
_SMALLEST, _LARGEST = 2.0**-10 / UNIT, (2.0**6 - 2.0**-17) / UNIT  # the latter is the last float below 2
_SMALLEST_CHANCE = 2.0**-16  # that noise can tell from none


def magprune(
    tau: Tensor, rows: Tensor, ranks: Tensor, noise: Tensor, least: float, slope: float, rescale: bool
) -> Tensor:
    """Elements where noise is below their chance, over that chance; zero elsewhere.

    Args:
        tau: float32 (r, c). It is overwritten.
        rows: (r, 1): what a row's magnitudes are multiplied by before they are put into buckets.
        ranks: (64,), of the buckets, from 0 to 1.
        noise: uniform in [0, 1), (r, c). It is overwritten.
        least: chance to be kept at rank 0.
        slope: what rank 1 adds to it.
        rescale: whether to divide by the chance.
    """
    if has_torch_function_unary(tau):
        recorded: Tensor = handle_torch_function(magprune, (tau,), tau, rows, ranks, noise, least, slope, rescale)
        return recorded
    chance = chances(ranks, least, slope).index_select(0, bucket(tau.abs().mul_(rows))).view_as(tau)
    tau.mul_(noise.lt_(chance))
    return tau.mul_(chance.reciprocal_()) if rescale else tau


def chances(ranks: Tensor, least: float, slope: float) -> Tensor:
    """The chance to be kept in each bucket."""
    return (ranks * slope).add_(least).clamp_min_(_SMALLEST_CHANCE)


def bucket(relative: Tensor) -> Tensor:
    """Bucket of each relative magnitude, int32, flat: the last bits of its exponent and the first of its fraction."""
    bits = relative.clamp_(_SMALLEST, _LARGEST).reshape(-1).view(torch.int32) >> _SHIFT
    return bits.bitwise_and_(N_BUCKETS - 1)
