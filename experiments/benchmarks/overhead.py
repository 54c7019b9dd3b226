"""How much of a candidate's time is not generation.

    python experiments/benchmarks/overhead.py RUN ...     # of finished searches, from their ledgers
    python experiments/benchmarks/overhead.py --large     # of a 1.24 B-parameter model: 10 GB of memory, 10 of disk

The floor of a dense model does not depend on its size: a linear merge of a base and two donors moves four times its
bytes, a decoding step at least once its bytes. At the same bandwidth a write then costs as much as some four steps,
and at most 2% of a candidate that decodes two hundred or more.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from benchmark import machine, recipe_of, write_down
from checkpoints import LLAMA_1B, make
from record import recorded
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from evo.checkpoint import Checkpoint
from evo.ledger import Ledger
from evo.materializer import Materializer
from fitness.engines.columns import cache_name
from fitness.engines.transformers import find_slots
from fitness.types import Split

ROWS, STEPS, ROUNDS = 32, 8, 3
PAUSE = 60.0
"""Seconds between two candidates that only a run that was stopped in between can have."""


def of_run(run: Path) -> dict[str, float]:
    """Shares of the time between the ends of consecutive candidates."""
    with closing(Ledger.open(run, read_only=True)) as ledger:
        entries = [entry for entry in ledger.entries(Split.SEARCH) if entry.measured]
    found = [(b.time - a.time, b.detail) for a, b in pairwise(entries) if b.time - a.time < PAUSE]
    between = sum(seconds for seconds, _ in found)
    write, generate = (sum(d[f"{key}_seconds"] for _, d in found) for key in ("write", "generate"))
    return {
        "candidates": len(found),
        "write_share": write / between,
        "all_but_generation_share": 1 - generate / between,
    }


@torch.no_grad()
def of_large() -> dict[str, Any]:
    """A write into a resident model of random weights, and a step of it for a batch; the better of some rounds."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        folders = {name: make(Path(work) / name, LLAMA_1B, seed) for seed, name in enumerate(("base", "a", "b"))}
        checkpoints = {name: Checkpoint.open(folder) for name, folder in folders.items()}
        config = AutoConfig.from_pretrained(folders["base"])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        materializer = Materializer(checkpoints, find_slots(model))
        writes, steps = [], []
        for seed in range(ROUNDS + 1):  # the first write compiles a loop and maps the files
            recipe = recipe_of(folders, "linear", seed, checkpoints["base"]).to_dict()
            writes.append(materializer.write(recipe).seconds)
        cache, token = DynamicCache(config=config), torch.full((ROWS, 1), 7)
        for _ in range(STEPS + 1):
            start = time.perf_counter()
            model(token, **{cache_name(model): cache}, use_cache=True)
            steps.append(time.perf_counter() - start)
    write, step = min(writes[1:]), min(steps[1:])
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "write_seconds": write,
        "step_seconds": step,
        "rows": ROWS,
        "steps_a_write_costs": write / step,
        "write_share_of_256_steps": write / (write + 256 * step),
    }


def main() -> None:
    """Measure, print, and merge the figures into results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--large", action="store_true")
    arguments = parser.parse_args()
    kept = recorded().get("overhead", {})
    kept |= {run.name: of_run(run) for run in arguments.runs}
    if arguments.large:
        kept["llama_1b"] = {**of_large(), "machine": machine()}
    write_down({"overhead": kept})


if __name__ == "__main__":
    main()
