"""Task arithmetic (arXiv 2212.04089): add scaled task vectors to the model that they were trained from."""

from collections.abc import Sequence

from torch import Tensor

from evo.merge import Method, one_hot


def task_arithmetic(donors: Sequence[Tensor], base: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Base + sum_d c_d * tau_d, with the task vector tau_d = donor_d - base (their section 2)."""
    merged = base.clone()
    for donor, coefficient in zip(donors, coefficients, strict=True):
        merged += (donor - base) * coefficient
    return merged


TASK_ARITHMETIC = Method(task_arithmetic, copy_of=one_hot, from_ancestor=True, is_mixture=True)
