"""Runs one merge method on tensors, as the materializer does: measure, draw noise, merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from evo.merge import Stats, get_method
from evo.merge.blocks import as_matrix
from evo.merge.noise import stream_key, uniforms

SETTINGS: dict[str, dict[str, float]] = {
    "ties": {"density": 0.5, "density:b": 0.3, "lambda": 0.9},
    "dare_linear": {"density": 0.5, "density:b": 0.25},
    "dare_ties": {"density": 0.7},
    "della": {"density": 0.5, "epsilon": 0.2},
    "della_linear": {"density": 0.3, "normalize": 1.0},
    "breadcrumbs": {"density": 0.6, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.5, "gamma:a": 0.2},
    "nuslerp": {"origin": 1.0},
    "karcher": {"origin": 0.0},
    "sce": {"select_topk": 0.4},
    "model_stock": {"filter_wise": 1.0},
    "nearswap": {"t": 0.05},
    "ram": {"epsilon": 0.05},
    "aoe": {"delta": 0.32},
    "passthrough": {"scale": 1.5},
}
"""Knobs that make a method do all of its work; methods that are not named have none that matter."""


def arguments_of(
    name: str, donors: Mapping[str, Tensor], base: Tensor, knobs: Mapping[str, float], seed: int = 0
) -> dict[str, object]:
    """Everything that a merge of these inputs takes besides coefficients."""
    method = get_method(name)
    arguments = method.arguments(knobs, tuple(donors))
    found = dict(arguments)
    matrix, matrices = as_matrix(base), [as_matrix(donor) for donor in donors.values()]
    if method.measure:
        chosen = {knob: arguments[knob] for knob in method.measure.knobs}
        stats: Stats | list[Stats]
        if method.measure.per_donor:
            stats = [
                method.measure.function([donor], matrix, **{k: v[d] for k, v in chosen.items()})
                for d, donor in enumerate(matrices)
            ]
        else:
            stats = method.measure.function(matrices, matrix, **chosen)
        found["stats"] = stats
    if method.random:
        found["noise"] = [uniforms(stream_key(seed, d), 0, base.numel()).view_as(matrix) for d in donors]
    return found


def merge(
    name: str,
    donors: Sequence[Tensor],
    base: Tensor,
    coefficients: Sequence[float],
    knobs: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Tensor:
    """The merge of whole float32 tensors; donors are called a, b, c, ..."""
    named = {chr(ord("a") + d): donor for d, donor in enumerate(donors)}
    arguments = arguments_of(name, named, base, knobs or {}, seed)
    matrices = [as_matrix(donor) for donor in donors]
    merged = get_method(name).merge(matrices, as_matrix(base), list(coefficients), **arguments)
    assert merged.dtype == torch.float32
    return merged.view_as(base)
