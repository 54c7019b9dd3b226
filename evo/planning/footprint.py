"""Bytes of what a search holds, from the headers of its checkpoints and config.json alone.

Knows how the default engine keeps its cache (fitness.engines.columns).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from evo.checkpoint import Checkpoint
from evo.holdings import matrix_of
from evo.parallel import own_parts, part_shape
from fitness.engines.columns import SPARE_COLUMNS
from fitness.engines.outline import described, outline_of

MIB = 1 << 20
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = {4: torch.float32, 2: torch.bfloat16}
"""By the bytes of a number; of 16 bits either does."""
KERNEL_BYTES, MOST_KERNELS = 570_000, 1024
"""What oneDNN keeps of a matrix product in bfloat16, whatever its shape, and of how many (as measured)."""


@lru_cache
def model_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Of the resident model: every scored tensor, in the engine's dtype; a tied head is the embedding. Towers that see
    or hear are loaded, too.
    """
    n_scored = sum(math.prod(part_shape(checkpoint, part)) for part in own_parts(checkpoint))
    outline = outline_of(checkpoint.config(), getattr(torch, dtype))
    return DTYPE_BYTES[dtype] * max(n_scored, outline.n_weights if outline else 0)


@lru_cache
def export_bytes(interface: Checkpoint) -> int:
    """Of an export: its tensors as they are stored (MXFP4 becomes bfloat16), tokenizer and configs."""
    tensors = sum(header.n_bytes for header in interface.written_headers().values())
    return tensors + sum(file.stat().st_size for file in interface.companions())


@lru_cache
def kernel_bytes(checkpoint: Checkpoint, prompt: int, rows: int) -> int:
    """Of matrix products in bfloat16 on a CPU with AVX-512: torch has oneDNN compile one for each shape of a weight and
    each number of tokens that go through it together. Steps have any number up to all rows, and prompts half as many
    more, though not all occur in a large batch, as measured; through an expert goes any share of a batch's prompts.

    Args:
        checkpoint: of the resident model.
        prompt: tokens of the longest prompt.
        rows: answers decoded together.
    """
    parts = own_parts(checkpoint)
    shapes = {(part.expert is not None, matrix_of(checkpoint, part)) for part in parts}
    dense = min(rows * 3 // 2, rows // 2 + 32)
    numbers = (rows * prompt if of_expert else dense for of_expert, (n, _) in shapes if n > 1)
    return KERNEL_BYTES * min(MOST_KERNELS, sum(numbers))


def cache_token_bytes(config: Mapping[str, Any], item: int) -> int:
    """Cached keys and values of one token. Of MLA (DeepSeek) transformers caches the latents.

    Args:
        config: config.json.
        item: bytes of a number.
    """
    if (outline := outline_of(config, DTYPES[item])) and outline.row:
        return outline.row.token
    config = described(config)
    if rank := config.get("kv_lora_rank"):
        width = rank + config["qk_rope_head_dim"]
    else:
        heads, head = _heads(config)
        width = 2 * (config.get("num_key_value_heads") or heads) * head
    return int(config["num_hidden_layers"] * width * item)


def cache_row_bytes(config: Mapping[str, Any], prompt: int, max_tokens: int, item: int) -> int:
    """Cached keys and values of one answer, in as many columns as their buffer comes to have.

    Args:
        config: config.json.
        prompt: tokens of the longest prompt.
        max_tokens: of an answer.
        item: bytes of a number.
    """
    if (outline := outline_of(config, DTYPES[item])) and not outline.columnar:
        return row_bytes(config, prompt + max_tokens, item)
    return columns(prompt, max_tokens) * cache_token_bytes(config, item)


def row_bytes(config: Mapping[str, Any], n_tokens: int, item: int) -> int:
    """What a model remembers of a row of so many tokens, in a buffer without room to spare. See cache_token_bytes."""
    if (outline := outline_of(config, DTYPES[item])) and outline.row:
        return outline.row.n_bytes(n_tokens)
    return n_tokens * cache_token_bytes(config, item)


def step_row_bytes(config: Mapping[str, Any], prompt: int, max_tokens: int, item: int, logit: int) -> int:
    """What a forward pass takes for one answer, at its worst: a layer's activations over the prompt, or its keys and
    values made out for every head (of MLA's latents, or of heads that share them), and the logits.

    Args:
        config: config.json.
        prompt: tokens of the longest prompt.
        max_tokens: of an answer.
        item: bytes of a number.
        logit: bytes that drawing takes for each token of the vocabulary.
    """
    config = described(config)
    heads, head = _heads(config)
    expanded = 2 * head if (config.get("num_key_value_heads") or heads) != heads else 0
    if config.get("kv_lora_rank"):
        nope, rope, value = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        expanded = nope + value + nope + rope  # latents times kv_b, and keys joined from two
    experts = (config.get("moe_intermediate_size") or 0) * (config.get("num_experts_per_tok") or 1)
    dense = config.get("intermediate_size") or 4 * config["hidden_size"]  # where it is not said, as in GPT-2
    wide = max(*(dense if isinstance(dense, Sequence) else [dense]), experts)  # Gemma 3n has one a layer
    prefill, step = prompt * (4 * config["hidden_size"] + 3 * wide), (prompt + max_tokens) * heads * expanded
    return int(max(prefill, step) * item + logit * config["vocab_size"])


def columns(prompt: int, max_tokens: int) -> int:
    """Of the cache's buffer once the longest answer is in it: it grows by half of what is in use."""
    n = prompt + SPARE_COLUMNS
    while n < prompt + max_tokens:
        n += max(SPARE_COLUMNS, n // 2)
    return n


def gpu_columns(n_tokens: int) -> int:
    """Of the same buffer, at most, however its rows came and went: it may have to grow just before the longest ends.
    On a GPU all of it is taken; on a CPU no more than is used.

    Args:
        n_tokens: of the longest prompt and its answer.
    """
    return n_tokens + max(SPARE_COLUMNS, n_tokens // 2)


def parked_tokens(rows: int, n_tokens: int, lowest: int) -> int:
    """Of answers that wait for others of their length, at most: with the batch, of a full one and one more row
    (fitness.engines.levels); but much of the batch's buffer may be empty.

    Args:
        rows: answers decoded together.
        n_tokens: of the longest prompt and its answer.
        lowest: tokens of an answer up to which none is parked.
    """
    return (rows + 1) * n_tokens if lowest < n_tokens else 0


def _heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """How many there are, and the size of one."""
    heads = config.get("num_attention_heads") or 1  # Mamba has none
    return heads, config.get("head_dim") or config["hidden_size"] // heads
