"""A search with the proxy beside one without, for the same generated tokens; fronts judged on held-out problems.

    python experiments/proxy/live.py [--out runs/live] [--seeds 3] [--tokens 1000000] [--jobs 1]

A replay cannot say what an optimizer makes of estimates; this does, with the parents, space and optimizer of
experiments/chimera_mini/proof.yaml. The proxy's baselines (points of the line, from which it learns) are paid for from
the same tokens. Adds "live" to results.json. Runs that are already there are not repeated.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from record import base_config
from record import run as search
from recording import OBJECTIVES

from evo import Search
from evo.ledger import Ledger, holding
from evo.pareto import Scale
from evo.types import Status
from fitness.types import Split

HERE = Path(__file__).parent
HELD_OUT = 1000
WAYS = {
    "proxy": {"proxy": {"enabled": True}, "baselines": {"average": True, "line_points": 3}},
    "full": {},
}


def run(seed: int, tokens: int, folder: Path) -> None:
    """Both ways, each to its end."""
    for way, changes in WAYS.items():
        config = base_config() | changes | {"seed": seed, "budget": {"tokens": tokens}}
        config["task"]["held_out"] = HELD_OUT
        search(config, folder / f"{way}-{seed}")


def judge(folder: Path) -> dict[str, Any]:
    """Held-out hypervolume of a run's front in its parents' box, its members, and what became of its candidates."""
    front = Search.open(folder).front()
    with closing(Ledger.open(folder, read_only=True)) as ledger:
        held_out = {e.candidate_id: e.losses for e in ledger.entries(Split.HELD_OUT) if e.losses is not None}
        searched, later = ledger.entries(Split.SEARCH), ledger.later()
    scale = Scale.of_parents(OBJECTIVES, [held_out[row.ask.id] for row in front.parents])
    members = sorted((list(held_out[row.ask.id]) for row in front.members), key=lambda losses: losses[1])
    return {
        "hypervolume": scale.hypervolume(members),
        "members": [{"accuracy": 1.0 - error, "tokens": tokens} for error, tokens in members],
        "candidates": len(searched),
        "partial": sum(entry.status is Status.PARTIAL for entry in holding(searched, later)),
        "tokens": sum(entry.n_tokens for entry in (*searched, *later)),
    }


def main() -> None:
    """Run what is missing, judge, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/live"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    arguments = parser.parse_args()
    seeds = list(range(arguments.seeds))
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(run, seeds, [arguments.tokens] * len(seeds), [arguments.out] * len(seeds)))
    wanted = [(way, seed) for seed in seeds for way in WAYS]
    found = {f"{way}-{seed}": judge(arguments.out / f"{way}-{seed}") for way, seed in wanted}
    for name, row in found.items():
        members = ", ".join(f"{m['accuracy']:.3f} at {m['tokens']:.1f}" for m in row["members"])
        print(
            f"{name}: hypervolume {row['hypervolume']:.4f}, {row['candidates']} candidates, {row['partial']} of them ",
            end="",
        )
        print(f"partial, {row['tokens']} tokens: {members}")
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**results, "live": {"budget_tokens": arguments.tokens, **found}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
