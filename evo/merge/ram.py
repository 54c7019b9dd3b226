"""RAM, Reinforced Agent Merging (arXiv 2601.13572): average only what several donors have changed."""

from collections.abc import Sequence

from torch import Tensor

from evo.merge import Knob, Method, base_at_zero
from evo.merge.task_vectors import total_of, weighted_sum


def ram(donors: Sequence[Tensor], base: Tensor, coefficients: Sequence[float], *, epsilon: float) -> Tensor:
    """Base + sum_d c_d m_d tau_d / n, where m_d = [|tau_d| > epsilon] and n = sum_d m_d of an element.

    What one donor alone has changed is taken over whole, what several have changed is averaged over them. All
    coefficients 1 give the paper's merge; c_d scales what donor d adds to it.
    """
    changes = [(donor - base).hardshrink(epsilon) for donor in donors]
    merged = weighted_sum(changes, coefficients)
    n_changing = total_of([change.sign_().abs_() for change in changes])
    return merged.div_(n_changing.clamp_min_(1.0)).add_(base)


RAM = Method(ram, copy_of=base_at_zero, knobs={"epsilon": Knob(1e-5, 0.0, 1.0)}, from_ancestor=True)
