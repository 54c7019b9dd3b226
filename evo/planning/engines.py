"""What an engine holds on its device beside what is merged, and what of it nobody knows before it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from evo.checkpoint import Checkpoint
from evo.config import Config
from evo.planning.footprint import (
    DTYPE_BYTES,
    DTYPES,
    MIB,
    cache_row_bytes,
    cache_token_bytes,
    export_bytes,
    gpu_columns,
    kernel_bytes,
    model_bytes,
    parked_tokens,
    step_row_bytes,
)
from evo.planning.sources import Item
from evo.planning.times import size
from fitness.engines.levels import lowest_level
from fitness.engines.outline import outline_of
from fitness.engines.sampling import Settings as Sampling
from fitness.engines.text import generation_config
from fitness.engines.vllm import cache_bytes, ranks, share_of_memory
from fitness.types import Decoding

CUDA_BYTES = 512 * MIB
"""Context and kernels on a GPU. Not measured."""


@dataclass(frozen=True)
class Held:
    """By an engine."""

    items: tuple[Item, ...]
    model: int
    """Bytes of the resident model."""
    row: int
    """Bytes of one answer while it is decoded."""
    unknown: tuple[str, ...] = ()
    """What is in no item."""
    short: str = ""
    """Why it could not start, however much is free; empty if it could."""


def transformers(config: Config, interface: Checkpoint, load: Any, settings: Any) -> Held:
    """Weights, and what answers that are decoded together take."""
    device, model, prompt = settings.device, model_bytes(interface, settings.dtype), load.prompt
    cached, step = _row_bytes(config, interface, prompt, settings.dtype)
    waiting = 0
    if device == "gpu" and _is_refilled(interface, settings.dtype):
        n_tokens = prompt + config.engine.max_tokens
        token = cache_token_bytes(interface.config(), DTYPE_BYTES[settings.dtype])
        cached, lowest = gpu_columns(n_tokens) * token, lowest_level(model, settings.rows, token)
        waiting = parked_tokens(settings.rows, n_tokens, lowest) * token if settings.rows < load.most else 0
    items = [
        Item(device, "the resident model", model),
        Item(device, f"cached keys and values of {settings.rows} answers", cached * settings.rows),
        Item(device, "a pass through a layer, and logits", step * settings.rows),
    ]
    if (device, settings.dtype) == ("host", "bfloat16") and settings.has_avx512:
        items.append(Item("host", "compiled matrix products", kernel_bytes(interface, prompt, settings.rows)))
    if device == "gpu":
        items.append(Item("gpu", "cached keys and values of answers that wait for others as long", waiting))
        items += [Item("host", "the model while it is loaded", model), Item("gpu", "CUDA", CUDA_BYTES)]
    return Held(tuple(items), model, cached + step)


def _is_refilled(interface: Checkpoint, dtype: str) -> bool:
    """Whether rows of a batch come and go, which takes a cache of plain keys and values."""
    outline = outline_of(interface.config(), DTYPES[DTYPE_BYTES[dtype]])
    return outline is None or outline.columnar


def vllm(config: Config, interface: Checkpoint, load: Any, settings: Any) -> Held:
    """Of one rank: its weights, which stay quantised, and a cache: as large as it is told, or all that is left of its
    share.
    """
    options: Mapping[str, Any] = config.engine.options.get("options") or {}
    n_ranks = ranks(options)
    device, whole, prompt = settings.device, model_bytes(interface, settings.dtype), load.prompt
    weights = (export_bytes(interface) if interface.quantization else whole) // n_ranks
    cached, step = _row_bytes(config, interface, prompt, settings.dtype)
    told = cache_bytes(options, "cpu" if device == "host" else "cuda")
    allowed = int((settings.share or share_of_memory(options)) * settings.total)
    cache = told if told is not None else max(cached, allowed - weights)
    what = "vLLM's cache of keys and values" if told is not None else "the rest of vLLM's share: cache and activations"
    unknown = ["how many answers vLLM decodes together"] if "batch_size" not in config.engine.options else []
    unknown += ["what vLLM needs for a pass"] * (told is not None) + ["what vLLM's reload of a merge takes for a while"]
    items = Item(device, "vLLM's weights", weights), Item(device, what, cache)
    short = ""
    if told is None and (least := weights + cached // n_ranks) > allowed:
        short = f"vLLM: expected at least {size(least)} for weights and one answer, but its share is {size(allowed)}."
    return Held(items, weights, cached + step, tuple(unknown), short)


def _row_bytes(config: Config, interface: Checkpoint, prompt: int, dtype: str) -> tuple[int, int]:
    sizes = interface.config(), prompt, config.engine.max_tokens, DTYPE_BYTES[dtype]
    asked = config.engine.options.get("decoding") or {}  # checked when the config was read
    decoding = asked if isinstance(asked, Decoding) else Decoding(**asked)
    logit = Sampling.of(_generation_config(str(interface.path)), decoding).logit_bytes
    return cache_row_bytes(*sizes), step_row_bytes(*sizes, logit)


_generation_config = lru_cache(generation_config)  # a plan is made for hundreds of settings


def unknown(config: Config, interface: Checkpoint, load: Any, settings: Any) -> Held:
    """Of an engine that is not in the table: its weights, at least."""
    model = model_bytes(interface, settings.dtype)
    what = f"all but the weights of the engine {config.engine.kind!r}"
    return Held((Item(settings.device, "the resident model", model),), model, 1, (what,))


HELD: Mapping[str, Callable[[Config, Checkpoint, Any, Any], Held]] = {"transformers": transformers, "vllm": vllm}
"""By engine."""
