"""How several processes share a model, and what each of them does. Imported by spawned processes: light."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from evo import parallel
from evo.checkpoint import Checkpoint
from evo.materializer import Materializer
from evo.shards import Shard


def slots_of(
    layout: str, checkpoint: Checkpoint, rank: int, n: int
) -> tuple[dict[str, list[Shard]], dict[str, torch.Tensor]]:
    """Slots of a rank, and the tensors in them, by "NAME|rows|columns"; a vector by its name."""

    def new(name: str, shape: Sequence[int]) -> torch.Tensor:
        return torch.full(tuple(shape), torch.nan, dtype=torch.float32 if "e_score" in name else torch.bfloat16)

    slots, tensors = parallel.slots_of(layout, checkpoint, rank, n, new), {}
    for name, shards in slots.items():
        for shard in shards:
            ends = [f"{s.start}:{s.stop}" for s in (shard.rows, shard.columns)] if shard.slot.dim() == 2 else []
            tensors["|".join([name, *ends])] = shard.slot
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
