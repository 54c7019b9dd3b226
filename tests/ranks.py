"""How several processes share a model, and what each of them does. Imported by spawned processes: light."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from evo.checkpoint import Checkpoint
from evo.materializer import Materializer
from evo.shards import Shard

Region = tuple[slice, slice]
ROWS = re.compile(r"(q_b_proj|kv_b_proj|gate_proj|up_proj|embed_tokens|lm_head)\.weight$")
COLUMNS = re.compile(r"(o_proj|down_proj)\.weight$")


def tensor_parallel(name: str, shape: tuple[int, ...], rank: int, n: int) -> Region | None:
    """What a rank holds of a matrix; None for all of a tensor. The last rank's share may be larger."""
    dim = 0 if ROWS.search(name) else 1 if COLUMNS.search(name) else None
    if dim is None:
        return None
    share = shape[dim] // n
    cut = slice(rank * share, (rank + 1) * share if rank < n - 1 else shape[dim])
    return (cut, slice(0, shape[1])) if dim == 0 else (slice(0, shape[0]), cut)


def holds(kind: str, name: str, rank: int, n: int) -> bool:
    """Whether a rank has any of a tensor."""
    layer, expert = re.search(r"layers\.(\d+)", name), re.search(r"experts\.(\d+)", name)
    if kind == "pipeline":
        stage = int(layer[1]) if layer else 0 if "embed" in name else n - 1
        return min(stage, n - 1) == rank
    return kind != "expert" or expert is None or int(expert[1]) % n == rank


def slots_of(kind: str, checkpoint: Checkpoint, rank: int, n: int) -> tuple[dict, dict[str, torch.Tensor]]:
    """Slots of a rank, and the tensors in them, by "NAME|rows|columns"."""
    slots, tensors = {}, {}
    for name, entry in checkpoint.scored.items():
        if not holds(kind, name, rank, n):
            continue
        dtype = torch.float32 if "e_score" in name else torch.bfloat16
        region = tensor_parallel(name, entry.shape, rank, n) if kind == "tensor" else None
        shape = [s.stop - s.start for s in region] if region else entry.shape
        tensor = torch.full(tuple(shape), torch.nan, dtype=dtype)
        slots[name] = [Shard(tensor, *region)] if region else tensor
        ends = [f"{s.start}:{s.stop}" for s in region] if region else ["", ""]
        tensors["|".join([name, *ends])] = tensor
    return slots, tensors


def run_rank(rank: int, n: int, sources: dict[str, str], recipes: dict[str, dict], kinds: list[str], out: str) -> None:
    """One process: write every recipe into its own slots, and these to files."""
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(sources["a"])
    for kind in kinds:
        slots, tensors = slots_of(kind, checkpoint, rank, n)
        materializer = Materializer.hosted(slots, sources, partial=True)
        for name, recipe in recipes.items():
            materializer.write(recipe)
            save_file(tensors, Path(out) / f"{kind}-{name}-{rank}.safetensors")
