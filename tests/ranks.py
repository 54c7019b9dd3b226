"""How several processes share a model, and what each of them does. Imported by spawned processes: light."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from evo.checkpoint import Checkpoint
from evo.materializer import Materializer
from evo.merge.blocks import cut_shape
from evo.parallel import own_parts, part_shape, place
from evo.shards import Shard


def slots_of(
    layout: str, checkpoint: Checkpoint, rank: int, n: int
) -> tuple[dict[str, list[Shard]], dict[str, torch.Tensor]]:
    """Slots of a rank, and the tensors in them, by "NAME|rows|columns"; a vector by its name."""

    slots: dict[str, list[Shard]] = {}
    tensors = {}
    for part in own_parts(checkpoint):
        shape = part_shape(checkpoint, part)
        if region := place(layout, part, n, checkpoint.layout.n_blocks).region(shape, rank, n):
            dtype = torch.float32 if "e_score" in part.tensor else torch.bfloat16
            slot = torch.full(cut_shape(shape, region), torch.nan, dtype=dtype)
            slots.setdefault(part.tensor, []).append(Shard(slot, *region, expert=part.row))
            ends = [f"{s.start}:{s.stop}" for s in region] if slot.dim() == 2 else []
            tensors["|".join([part.tensor, *ends])] = slot
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
