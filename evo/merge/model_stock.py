"""Model Stock (arXiv 2403.19522): how far to go from the ancestor to the average, from the angle between donors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from evo.merge import Measure, Method, Stats, base_at_zero
from evo.merge.statistics import gram
from evo.merge.task_vectors import switch, weighted_sum


def model_stock(
    donors: Sequence[Tensor], base: Tensor, coefficients: Sequence[float], *, stats: Stats, filter_wise: float
) -> Tensor:
    """Base + t * (1 / N) * sum_d c_d tau_d, with t = N cos(theta) / (1 + (N - 1) cos(theta)).

    All coefficients 1 give the paper's w_H = t w_avg + (1 - t) w_0.
    """
    merged = weighted_sum([donor - base for donor in donors], [c / len(donors) for c in coefficients])
    t = stats.whole if stats.rows is None else stats.rows
    return merged.mul_(t).add_(base)


def ratio(donors: Sequence[Tensor], base: Tensor, *, filter_wise: float) -> Stats:
    """t, from the mean cosine over all pairs of task vectors: of the whole tensor, or of each row.

    A donor that equals the base has no direction: cosine 0. Where 1 + (N - 1) cos(theta) = 0, t = 0. With one
    donor t = 1.
    """
    n = len(donors)
    g = gram(donors, base, by_row=bool(filter_wise))
    cosines = [
        torch.where(length > 0.0, g[..., i, j] / length, 0.0).clamp(-1.0, 1.0)
        for i, j in combinations(range(n), 2)
        for length in [(g[..., i, i] * g[..., j, j]).sqrt()]
    ]
    cosine = torch.stack(cosines).mean(0) if cosines else torch.ones(g.shape[:-2], dtype=torch.float64)
    divisor = 1.0 + (n - 1) * cosine
    t = torch.where(divisor.abs() < 1e-6, 0.0, n * cosine / divisor)
    return Stats(rows=t.float()[:, None].to(base.device)) if filter_wise else Stats(float(t))


MODEL_STOCK = Method(
    model_stock,
    copy_of=base_at_zero,
    knobs={"filter_wise": switch(False)},
    measure=Measure(ratio, ("filter_wise",)),
    from_ancestor=True,
)
