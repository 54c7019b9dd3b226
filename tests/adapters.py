"""LoRA adapters as peft saves them, and what they come to."""

import json

import numpy as np
import torch
from safetensors.torch import save_file

from tests.encoding import files_of, values_in

RANK = 4
TARGETS = ("q_proj", "down_proj", "embed_tokens")


def make_adapter(folder, base, seed, *, extra=None, **settings):
    """An adapter as peft saves it, on every target module of a base."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)

    def factor(*shape):
        return torch.randn(shape, generator=generator) * torch.logspace(-3, 0, shape[-1])

    tensors = {}
    for name, tensor in files_of(base).items():
        module = name.removesuffix(".weight")
        rank = settings.get("rank_pattern", {}).get(module.rpartition(".")[2], RANK)
        if module.endswith("embed_tokens"):
            key = f"base_model.model.{module}.lora_embedding_"
            tensors |= {f"{key}A": factor(rank, tensor.shape[0]), f"{key}B": factor(tensor.shape[1], rank)}
        elif module.endswith(TARGETS):
            key, (n_out, n_in) = f"base_model.model.{module}.lora_", tensor.shape
            tensors |= {f"{key}A.weight": factor(rank, n_in), f"{key}B.weight": factor(n_out, rank)}
    save_file({**tensors, **(extra or {})}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": list(TARGETS), **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def expected_of(base, adapter, scale_of):
    """Float64 values of base plus difference, from the files alone."""
    values = {name: value.astype(np.float64) for name, value in values_in(base).items()}
    factors = {key.removeprefix("base_model.model."): t.double().numpy() for key, t in files_of(adapter).items()}
    for key in factors:
        module, _, side = key.removesuffix(".weight").rpartition(".")
        if side == "lora_A":
            values[f"{module}.weight"] += scale_of(module) * factors[f"{module}.lora_B.weight"] @ factors[key]
        elif side == "lora_embedding_A":
            values[f"{module}.weight"] += scale_of(module) * (factors[f"{module}.lora_embedding_B"] @ factors[key]).T
    return values
