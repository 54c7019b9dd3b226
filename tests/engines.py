"""Every engine made alike, and a look into it, for tests that run over all of them."""

import inspect
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from evo.checkpoint import Checkpoint
from fitness.engines import ENGINES, what_is_missing

KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(what_is_missing(kind) is not None, reason=f"{kind} is not installed"))
    for kind in ENGINES
]
OPTIONS: dict[str, dict[str, Any]] = {
    "vllm": {"options": {"kv_cache_memory_bytes": 64 << 20, "max_model_len": 256, "block_size": 32}},
}
"""What an engine needs besides the usual."""
OPTIONAL = {"decoding", "batch_size"}
"""Options that an engine need not have; tests of them skip without."""


@contextmanager
def running(kind: str, path: Path, **options: Any) -> Iterator[Any]:
    """An engine in float32 on the CPU, which decodes 4 prompts together. vLLM allows one at a time in a process."""
    engine_class = pkgutil.resolve_name(ENGINES[kind])
    known = inspect.signature(engine_class).parameters.keys()
    if lacking := OPTIONAL & options.keys() - known:
        pytest.skip(f"{kind} has no option {' nor '.join(lacking)}")
    usual = {"dtype": "float32", "device": "cpu", "batch_size": 4}
    chosen = {name: value for name, value in usual.items() if name in known} | OPTIONS.get(kind, {}) | options
    if kind != "vllm":
        yield engine_class(str(path), **chosen)
        return
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm
    with patch.object(utils, pack.__name__, lambda layer, remove_weight: pack(layer, False)):  # so that tests can read
        engine = engine_class(str(path), **chosen)
        try:
            yield engine
        finally:
            engine._llm.llm_engine.engine_core.shutdown()


def module_of(engine: Any) -> torch.nn.Module:
    """The module that computes logits: vLLM's, or the one that an engine holds."""
    if hasattr(engine, "_llm"):
        return engine._llm.apply_model(lambda module: module)[0]
    held = [value for value in vars(engine).values() if isinstance(value, torch.nn.Module)]
    assert len(held) == 1, f"{type(engine).__name__} holds {len(held)} torch modules: say here which computes logits"
    return held[0]


def resident(engine: Any, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """An engine's weights under the names and in the shapes that they have in a checkpoint."""
    try:
        slots = engine.slots()
    except NotImplementedError:
        shapes = {name: header.shape for name, header in checkpoint.headers.items()}
        return dict(_unfused(module_of(engine), shapes))
    return {name: slots[name] for name in checkpoint.headers}


FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}


def _unfused(model: torch.nn.Module, shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.named_parameters():
        prefix, _, attribute = name.rpartition(".")
        module, _, kind = prefix.rpartition(".")
        if kind in FUSED:
            names = [f"{module}.{part}.{attribute}" for part in FUSED[kind]]
            yield from zip(names, tensor.split([shapes[n][0] for n in names]), strict=True)
        elif attribute in ("w13_weight", "w2_weight"):
            kernel = model.get_submodule(prefix).quant_method.moe_kernel.fused_experts
            for expert, rows in enumerate(_unpacked(tensor, kernel.isa)):
                experts = f"{prefix.removesuffix('.routed_experts')}.{expert}"
                if attribute == "w2_weight":
                    yield f"{experts}.down_proj.weight", rows
                else:
                    yield from zip(
                        (f"{experts}.gate_proj.weight", f"{experts}.up_proj.weight"), rows.chunk(2), strict=True
                    )
        elif name in shapes:  # MLA has further ones, made of kv_b_proj
            yield name, tensor[: shapes[name][0]]  # vLLM pads vocabularies


def _unpacked(packed: Tensor, isa: str) -> Tensor:
    """vLLM's order of an expert's elements on a CPU, found by packing their numbers, and undone."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    number = {2: torch.int16, 4: torch.int32}[packed.element_size()]  # as bits: 16-bit floats cannot count so far
    numbers = torch.arange(packed.numel()).to(number).view(packed.dtype).view(packed.shape)
    order = cpu_prepack_moe_weight(numbers, isa).view(number).flatten().long() % 2 ** (8 * packed.element_size())
    return torch.empty_like(packed).flatten().index_copy(0, order, packed.flatten()).view(packed.shape)
