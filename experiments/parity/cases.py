"""The merges that are compared: each said once in our terms and once in mergekit's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Number = float | bool


@dataclass(frozen=True)
class Case:
    """One merge."""

    name: str
    method: str
    coefficients: Mapping[str, float]
    base: str = "base"
    knobs: Mapping[str, float] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, Number]] = field(default_factory=dict)
    """mergekit's models, each with its own parameters. Default: the donors, with their coefficients as weights."""
    parameters: Mapping[str, Number] = field(default_factory=dict)
    """mergekit's parameters for all models."""
    with_base: bool = True
    """Whether mergekit is given a base model."""

    def config(self, folders: Mapping[str, str], dtype: str, out_dtype: str) -> dict[str, Any]:
        """The YAML for mergekit, as data."""
        models = self.models or {name: {"weight": c} for name, c in self.coefficients.items()}
        config: dict[str, Any] = {
            "merge_method": self.method,
            "models": [{"model": folders[name], "parameters": dict(of_model)} for name, of_model in models.items()],
            "parameters": dict(self.parameters),
            "dtype": dtype,
            "out_dtype": out_dtype,
        }
        if self.with_base:
            config["base_model"] = folders[self.base]
        return config


TWO, THREE = {"a": 0.6, "b": 0.3}, {"a": 1.0, "b": 0.7, "c": 0.4}
ONES = {"a": 1.0, "b": 1.0, "c": 1.0}
NO_WEIGHTS: dict[str, dict[str, Number]] = {"a": {}, "b": {}, "c": {}}
POINTS: dict[str, dict[str, Number]] = {"base": {"weight": 0.1}, "a": {"weight": 0.6}, "b": {"weight": 0.3}}
BASE_AND_A: dict[str, dict[str, Number]] = {"base": {}, "a": {}}


def _sparse(method: str, coefficients: Mapping[str, float], **knobs: float) -> Case:
    """A task-vector method: our knobs are mergekit's parameters."""
    switches = {"normalize", "rescale"}
    parameters = {k: bool(v) if k in switches else v for k, v in knobs.items()}
    said = ", ".join(f"{k} {v:g}" for k, v in knobs.items())
    return Case(f"{method} ({said})", method, coefficients, knobs=knobs, parameters=parameters)


DETERMINISTIC = [
    Case("linear", "linear", TWO, models=POINTS, with_base=False),
    Case("task_arithmetic", "task_arithmetic", TWO),
    _sparse("ties", THREE, density=0.4),
    _sparse("ties", THREE, density=0.25, normalize=0.0, **{"lambda": 0.8}),
    _sparse("breadcrumbs", TWO, density=0.6, gamma=0.05),
    _sparse("breadcrumbs_ties", THREE, density=0.5, gamma=0.02),
    Case("slerp", "slerp", {"a": 0.3}, models=BASE_AND_A, parameters={"t": 0.3}),
    Case("nuslerp, two models", "nuslerp", {"b": 0.3}, base="a", with_base=False,
         models={"a": {"weight": 0.7}, "b": {"weight": 0.3}}),
    Case("nuslerp, task vectors", "nuslerp", {"a": 0.7, "b": 0.3}, knobs={"origin": 1.0}),
    Case("multislerp, three models", "multislerp", TWO, models=POINTS, with_base=False),
    Case("multislerp, task vectors", "multislerp", THREE, knobs={"origin": 1.0}),
    Case("karcher", "karcher", {"a": 1 / 3, "b": 1 / 3}, models={"base": {}, "a": {}, "b": {}}, with_base=False),
    Case("sce", "sce", ONES, models=NO_WEIGHTS),
    Case("sce (select_topk 0.3)", "sce", ONES, models=NO_WEIGHTS, knobs={"select_topk": 0.3},
         parameters={"select_topk": 0.3}),
    Case("model_stock", "model_stock", ONES, models=NO_WEIGHTS),
    Case("model_stock (filter_wise)", "model_stock", ONES, models=NO_WEIGHTS, knobs={"filter_wise": 1.0},
         parameters={"filter_wise": True}),
    Case("nearswap (t 0.02)", "nearswap", {"a": 1.0}, models=BASE_AND_A, knobs={"t": 0.02}, parameters={"t": 0.02}),
    Case("arcee_fusion", "arcee_fusion", {"a": 1.0}, models=BASE_AND_A),
    Case("ram (epsilon 0.05)", "ram", ONES, models=NO_WEIGHTS, knobs={"epsilon": 0.05}, parameters={"epsilon": 0.05}),
    Case("passthrough (scale 0.7)", "passthrough", {"a": 1.0}, models={"a": {"scale": 0.7}}, with_base=False,
         knobs={"scale": 0.7}),
]  # fmt: skip

RANDOM = [
    _sparse("dare_linear", {"a": 1.0}, density=0.3),
    _sparse("dare_linear", {"a": 1.0}, density=0.8),
    _sparse("dare_ties", {"a": 1.0}, density=0.5),
    _sparse("della_linear", {"a": 1.0}, density=0.5, epsilon=0.2),
    _sparse("della", {"a": 1.0}, density=0.3, epsilon=0.1),
]
"""With one donor of weight 1, so that the mask shows in the result."""
