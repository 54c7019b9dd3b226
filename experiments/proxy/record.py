"""Makes the recordings that the proof replays: searches without a proxy, whose candidates answer every problem.

    python experiments/proxy/record.py [--out runs/recordings] [--jobs 2]      # 70 to 90 minutes of two cores

CMA-ES and random search over the parents of experiments/chimera_mini, and the line between them, on a split of
1,024 problems. Runs that are already there are not repeated; one that was interrupted goes on. At last, on a machine
that is idle by then, it times blocks of few and many problems.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from evo import Search
from evo.assemble import build_space, build_task, build_worker, first_candidates, open_sources
from evo.config_file import load_config
from evo.hub import recipe_sources
from evo.terminal import watching
from fitness.types import Split

PARENTS = Path(__file__).parent.parent / "chimera_mini"
RUNS: dict[str, dict[str, Any]] = {
    "line": {"space": {"kind": "line", "base": "concise"}, "optimizer": {"kind": "line_sweep", "points": 21}},
    "search-0": {"seed": 0, "budget": {"candidates": 220}},
    "random-0": {"optimizer": {"kind": "random"}, "budget": {"candidates": 140}},
    "search-1": {"seed": 1, "budget": {"candidates": 220}},
}
N_PROBLEMS = 1024
N_CONFIRM = 16
"""Of the reserve and held-out, which no replay reads."""
BLOCKS = (16, 32, 64, 128, 256, 512, 1024)
BLOCKS_FILE = "blocks.json"


def base_config() -> dict[str, Any]:
    """That of experiments/chimera_mini/proof.yaml, with absolute paths."""
    config: dict[str, Any] = yaml.safe_load((PARENTS / "proof.yaml").read_text())
    config["parents"] = {name: str(PARENTS / path) for name, path in config["parents"].items()}
    return config | {"base": str(PARENTS / config["base"])}


def run(config: dict[str, Any], folder: Path) -> None:
    """A search to its end, or the rest of one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    search = Search.from_yaml(path, folder)
    with watching(search) as watch:
        search.run(watch)


def record(name: str, folder: Path) -> None:
    """One recording."""
    config = base_config() | RUNS[name]
    config["task"] |= {"search": N_PROBLEMS, "reserve": N_CONFIRM, "held_out": N_CONFIRM}
    run(config, folder / name)


def time_blocks(folder: Path) -> None:
    """Writes a list of [longest answer, tokens, seconds] of the parents' and the average's first problems."""
    config = load_config(folder / "line.yaml")
    candidates = first_candidates(config, build_space(config, open_sources(config)), recipe_sources(config.sources, {}))
    worker, found = build_worker(config, build_task(config), None), []
    for candidate in candidates:
        for n in BLOCKS:
            evaluation = worker.evaluate(candidate, Split.SEARCH, n)
            assert evaluation.score is not None, evaluation.detail
            tokens = evaluation.score.n_tokens
            found.append([int(tokens.max()), int(tokens.sum()), evaluation.detail["generate_seconds"]])
    (folder / BLOCKS_FILE).write_text(json.dumps(found) + "\n")


def main() -> None:
    """All recordings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/recordings"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(record, arguments.only, [arguments.out] * len(arguments.only)))
    time_blocks(arguments.out)


if __name__ == "__main__":
    main()
