"""A search with the proxy beside one without, for the same generated tokens; fronts judged on held-out problems.

    python experiments/proxy/live.py [--out runs/live] [--seeds 3] [--tokens 1000000] [--jobs 1]

A replay cannot say what an optimizer makes of estimates; this does, with the parents, space and optimizer of
experiments/chimera_mini/proof.yaml. The proxy's baselines (nine points of the line, from which it learns) are paid for
from the same tokens. Adds "live" to results.json. Runs that are already there are not repeated.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml
from recording import OBJECTIVES

from evo import Search
from evo.ledger import Ledger
from evo.pareto import Scale
from evo.terminal import watching
from evo.types import Status
from fitness.types import Split

HERE = Path(__file__).parent
PARENTS = HERE.parent / "chimera_mini"
HELD_OUT = 1000
WAYS = {
    "full": {},
    "proxy": {"proxy": {"enabled": True}, "baselines": {"average": True, "line_points": 9}},
}


def run(way: str, seed: int, tokens: int, folder: Path) -> None:
    """One run, to its end."""
    config = yaml.safe_load((PARENTS / "proof.yaml").read_text()) | WAYS[way]
    config["parents"] = {name: str(PARENTS / path) for name, path in config["parents"].items()}
    config |= {"base": str(PARENTS / config["base"]), "seed": seed, "budget": {"tokens": tokens}}
    config["task"]["held_out"] = HELD_OUT
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{way}-{seed}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    search = Search.from_yaml(path, folder / path.stem)
    with watching(search) as watch:
        search.run(watch)


def judge(folder: Path) -> dict[str, Any]:
    """Held-out hypervolume of a run's front in its parents' box, its members, and what became of its candidates."""
    front = Search.open(folder).front()
    with closing(Ledger.open(folder, read_only=True)) as ledger:
        held_out = {e.candidate_id: e.losses for e in ledger.entries(Split.HELD_OUT) if e.losses is not None}
        searched = ledger.entries(Split.SEARCH)
    scale = Scale.of_parents(OBJECTIVES, [held_out[row.ask.id] for row in front.parents])
    members = sorted((list(held_out[row.ask.id]) for row in front.members), key=lambda losses: losses[1])
    return {
        "hypervolume": scale.hypervolume(members),
        "members": [{"accuracy": 1.0 - error, "tokens": tokens} for error, tokens in members],
        "candidates": len(searched),
        "partial": sum(entry.status is Status.PARTIAL for entry in searched),
        "tokens": sum(entry.n_tokens for entry in searched),
    }


def main() -> None:
    """Run what is missing, judge, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/live"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    arguments = parser.parse_args()
    wanted = [(way, seed) for seed in range(arguments.seeds) for way in WAYS]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        ways, seeds = zip(*wanted, strict=True)
        list(pool.map(run, ways, seeds, [arguments.tokens] * len(wanted), [arguments.out] * len(wanted)))
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
