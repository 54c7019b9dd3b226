"""Merge methods: pure functions on float32 tensors, one a file.

They know nothing of checkpoints, names or dtypes. Shapes: D donors; every tensor of a call has the same
shape (...), one chunk of one part. Products and sums are separate operations, each rounded once: with a
fused multiply-add a CPU and a GPU would give different bits, and an export must not depend on where it ran.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

METHODS = {
    "linear": "evo.merge.linear:LINEAR",
    "task_arithmetic": "evo.merge.task_arithmetic:TASK_ARITHMETIC",
}
"""Name -> Method, as "module:attribute"."""


@dataclass(frozen=True)
class Method:
    """A merge method."""

    merge: Callable[..., Tensor]
    """merge(donors, base, coefficients, **knobs): D float32 tensors, a float32 tensor, D numbers -> float32."""
    copy_of: Callable[[Sequence[float]], int | None]
    """Coefficients -> the input that the result equals in exact arithmetic (0 the base, d + 1 donor d), or
    None. There the stored bits are copied, since `base + (donor - base)` rounds."""
    knobs: tuple[str, ...] = ()
    """Names of the further arguments."""


def get_method(name: str) -> Method:
    """Look a method up.

    Raises:
        KeyError: if there is no method of this name.
    """
    method: Method = pkgutil.resolve_name(METHODS[name])
    return method


def one_hot(coefficients: Sequence[float]) -> int | None:
    """copy_of for methods that give the base at all 0 and donor d at a 1 among zeros."""
    active = [d for d, coefficient in enumerate(coefficients) if coefficient != 0.0]
    if not active:
        return 0
    return active[0] + 1 if len(active) == 1 and coefficients[active[0]] == 1.0 else None
