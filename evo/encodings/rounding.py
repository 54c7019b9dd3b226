"""What storing a merge cost: the relative error of each tensor that was quantised."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from evo.encodings import Watcher


class Rounding:
    """Adds up ||stored - merged||_F / ||merged||_F of every tensor that it watches."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def watcher(self, tensor: str) -> Watcher:
        """What to tell of a tensor's values, before and after."""

        def watch(values: Tensor, stored: Tensor) -> None:
            sums = self._sums[tensor]
            sums[0] += _square(stored - values)
            sums[1] += _square(values)

        return watch

    @property
    def errors(self) -> dict[str, float]:
        """Tensor -> relative error; a tensor of zeros has none."""
        return {name: (error / norm) ** 0.5 if norm else 0.0 for name, (error, norm) in self._sums.items()}

    def summary(self) -> str:
        """One sentence; empty if nothing was quantised."""
        if not (errors := self.errors):
            return ""
        worst = max(errors, key=errors.__getitem__)
        return (
            f"{len(errors)} merged tensors were quantised again, with a relative error (Frobenius) of "
            f"{sum(errors.values()) / len(errors):.4f} on average and {errors[worst]:.4f} at most ({worst})."
        )


def _square(matrix: Tensor) -> float:
    """Of the Frobenius norm; rows are short enough for float32."""
    return float(torch.linalg.vector_norm(matrix, dim=-1).double().square().sum())
