"""Seeded random checkpoints of a known shape, made without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from evo.checkpoint import SINGLE_FILE
from evo.encodings import TensorHeader
from evo.safetensors_writer import SafetensorsWriter

SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
    "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "bfloat16", "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
"""config.json of a model with 134,515,008 parameters."""
LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "bfloat16", "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
"""config.json of the shape of Llama 3.2 1B: 1,235,814,400 parameters."""

LLAMA_8B_CUT = {
    **LLAMA_1B, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, "head_dim": 128,
}  # fmt: skip
"""config.json of 8 of Llama 3.1 8B's 32 blocks (and tied embeddings): 2,270,236,672 parameters."""


def llama_shapes(config: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensor names and shapes of a Llama with tied embeddings."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries, keys = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        yield f"model.layers.{layer}.input_layernorm.weight", (hidden,)
        yield f"{attention}.q_proj.weight", (queries, hidden)
        yield f"{attention}.k_proj.weight", (keys, hidden)
        yield f"{attention}.v_proj.weight", (keys, hidden)
        yield f"{attention}.o_proj.weight", (hidden, queries)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{mlp}.gate_proj.weight", (inner, hidden)
        yield f"{mlp}.up_proj.weight", (inner, hidden)
        yield f"{mlp}.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)


def make(folder: Path, config: dict, seed: int, ancestor: int = 0) -> Path:
    """Write a bfloat16 checkpoint, unless it is there: an ancestor (seed 0), or a change of one by 5%."""
    if (folder / SINGLE_FILE).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = dict(llama_shapes(config))
    writer = SafetensorsWriter(folder / SINGLE_FILE, {name: TensorHeader("BF16", s) for name, s in shapes.items()})
    first, change = torch.Generator().manual_seed(ancestor), torch.Generator().manual_seed(1000 + seed)
    for name, shape in shapes.items():
        tensor = 0.02 * torch.randn(shape, generator=first)
        if seed:
            tensor += 0.001 * torch.randn(shape, generator=change)
        writer.write(name, tensor.bfloat16())
    writer.close()
    return folder
