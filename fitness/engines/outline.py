"""What a model takes in memory, told by transformers from config.json alone: it is built without weights.

Architectures differ in too much for a formula (shared heads, windows, recurrent states, towers that see), and published
configs leave out what is their architecture's default. Knows no checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fitness.engines.columns import RowMemory, is_columnar, row_memory
from fitness.engines.transformers import kind_of_model


@dataclass(frozen=True)
class Outline:
    """Of a model as the default engine holds it."""

    n_weights: int
    """Numbers in its weights, those of towers that see or hear included."""
    row: RowMemory | None
    """What it remembers of a row; None where that does not show without weights."""
    columnar: bool
    """Whether its rows come and go (fitness.engines.columns)."""


def outline_of(config: Mapping[str, Any], dtype: torch.dtype) -> Outline | None:
    """Build a model without weights. 671B parameters take 4 s.

    Args:
        config: a parsed config.json.
        dtype: of its weights.

    Returns:
        None for an architecture that transformers cannot build.
    """
    return _outline_of(json.dumps(config, sort_keys=True), dtype)


def described(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json says of the language model, under the names that most architectures use, with defaults filled
    in; of an architecture that transformers does not know, no more than is there.
    """
    return _described(json.dumps(config, sort_keys=True)) or config.get("text_config") or config


@lru_cache
def _described(config: str) -> Mapping[str, Any] | None:
    if (found := _parsed(config)) is None:
        return None
    text = found.get_text_config(decoder=True)
    return {**text.to_dict(), **{name: getattr(text, name, None) for name in text.attribute_map}}


def _parsed(config: str) -> PretrainedConfig | None:
    """What transformers makes of the text of a config.json; None if it can make nothing of it."""
    values = json.loads(config, object_hook=_as_float)
    if (kind := values.get("model_type")) not in CONFIG_MAPPING:
        return None
    values.pop("quantization_config", None)  # the resident model is not quantised
    try:
        return CONFIG_MAPPING[kind].from_dict(values)
    except Exception:  # whatever a config's own checks say of values that only other code understands
        return None


def _as_float(values: dict[str, Any]) -> Any:
    """Infinity and NaN, as transformers writes them: `{"__float__": "Infinity"}`."""
    return float(values["__float__"]) if values.keys() == {"__float__"} else values


@lru_cache
def _outline_of(config: str, dtype: torch.dtype) -> Outline | None:
    found = _parsed(config)
    if found is None:
        return None
    try:
        with torch.device("meta"):
            model = kind_of_model(found).from_config(found, dtype=dtype).eval()
    except Exception:  # an architecture that nobody can build will not be loaded either: the engine says why
        return None
    try:
        with torch.device("meta"):
            row = row_memory(model)
    except Exception:  # some look at numbers on their way, of which there are none
        row = None
    return Outline(sum(p.numel() for p in model.parameters()), row, is_columnar(model.config))
