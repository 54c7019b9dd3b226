"""Searches judged on 2,000 held-out problems, beside random search, the 21-point line and swaps of roles.

A search knows none of the swaps (these roles from one parent, the rest from the other): it starts in the middle
of the space, as one would whose parents nobody has taken apart yet. Random search has the same budget.

    python experiments/chimera_mini/proof.py [--out runs/proof] [--jobs 2]

Writes results.json beside this file. Runs that are already there are not repeated. Every choice
(which candidate is *the child* of a seed) reads search scores only; every figure is a held-out one.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from evo import Search
from evo.front import Front, Row
from evo.ledger import Ledger
from evo.pareto import Scale, nondominated
from evo.terminal import watching
from fitness.types import Score, Split

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
N_SWAPS = 16
"""Only this role from the reasoner, and all but this role, for each of eight roles."""
Z95 = 1.959964  # two-sided 95%


def config_of(name: str, folder: Path) -> Path:
    """proof.yaml with the changes that a run asks for, written beside the runs with absolute paths."""
    config = yaml.safe_load((HERE / "proof.yaml").read_text())
    for group, key in (("parents", "reasoner"), ("parents", "concise")):
        config[group][key] = str(HERE / config[group][key])
    config["base"] = str(HERE / config["base"])
    kind, _, seed = name.partition("-")
    config["seed"] = int(seed or 0)
    if kind == "line":
        config |= {"space": {"kind": "line", "base": "concise"}, "optimizer": {"kind": "line_sweep", "points": 21}}
    if kind == "swaps":
        config["baselines"] = {"average": False, "swaps": True}
        config["budget"] = {"candidates": N_SWAPS + 2}  # and the parents
    if kind == "random":
        config["optimizer"] = {"kind": "random"}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def run(name: str, folder: Path) -> None:
    """One run, to its end. Line and swaps are scored on held-out problems point by point, as they are baselines."""
    search = Search.from_yaml(config_of(name, folder), folder / name)
    with watching(search) as watch:
        search.run(watch)
        if name in ("line", "swaps"):
            search.score_held_out(watch, every=True)


def scores(search: Search, split: Split = Split.HELD_OUT) -> dict[str, Score]:
    """Name -> per-problem arrays of everything that was scored on a split."""
    with closing(Ledger.open(search.folder, read_only=True)) as ledger:
        names = {ask.id: ask.name for ask in ledger.asks()}
        return {names[e.candidate_id]: ledger.score(e) for e in ledger.entries(split) if e.losses is not None}


def line_scores(search: Search) -> dict[str, Score]:
    """The parents, and the 21 points of the line under their share of the reasoner, "0.00" to "1.00"."""
    found = scores(search)
    points = sorted((name for name in found if re.fullmatch(r"c\d+", name)), key=lambda name: int(name[1:]))
    shares = {name: f"{i / (len(points) - 1):.2f}" for i, name in enumerate(points)}
    return {shares.get(name, name): score for name, score in found.items()}


def losses(score: Score) -> list[float]:
    """Error and mean tokens."""
    return [1.0 - score.accuracy, score.tokens_mean]


def paired(child: Score, parent: Score) -> dict[str, float]:
    """The child's accuracy minus the parent's on the same problems, with a 95% interval."""
    difference = child.correct.mean(axis=1) - parent.correct.mean(axis=1)
    half = Z95 * float(difference.std(ddof=1)) / np.sqrt(len(difference))
    mean = float(difference.mean())
    return {"difference": mean, "low": mean - half, "high": mean + half}


def bootstrap_ratio(ours: list[Score], line: list[Score], scale: Scale, n: int = 1000) -> list[float]:
    """95% interval of the ratio of held-out hypervolumes, over resampled problems (the same for both)."""
    rng, n_problems = np.random.default_rng(0), ours[0].n_problems
    ratios = []
    for _ in range(n):
        picked = rng.integers(0, n_problems, n_problems)
        volumes = [
            scale.hypervolume([[1 - s.correct[picked].mean(), s.n_tokens[picked].mean()] for s in side])
            for side in (ours, line)
        ]
        ratios.append(volumes[0] / volumes[1])
    return [float(q) for q in np.quantile(ratios, [0.025, 0.975])]


def describe(score: Score) -> dict[str, float]:
    """What a table shows."""
    return {
        "accuracy": score.accuracy,
        "accuracy_stderr": score.accuracy_stderr,
        "tokens_mean": score.tokens_mean,
        "truncated": score.truncated,
        "n_problems": score.n_problems,
    }


def judge(search: Search, line: dict[str, Score]) -> dict[str, Any]:
    """One run against its parents and the line."""
    front, held_out = search.front(), scores(search)
    reasoner, concise = held_out["reasoner"], held_out["concise"]
    scale = Scale.of_parents(("error", "tokens"), [losses(reasoner), losses(concise)])
    members = {row.ask.name: held_out[row.ask.name] for row in front.members}
    child = child_of(front)
    interior = {name: s for name, s in line.items() if re.fullmatch(r"0\.\d\d", name) and name != "0.00"}
    points = np.array([losses(s) for s in (*members.values(), *interior.values())])
    on_front = nondominated(points)[len(members) :]
    ours, theirs = list(members.values()), [reasoner, concise, *interior.values()]
    volumes = [scale.hypervolume([losses(s) for s in side]) for side in (ours, theirs)]
    return {
        "child": {"name": child.ask.name, **describe(held_out[child.ask.name])},
        "child_minus_reasoner": paired(held_out[child.ask.name], reasoner),
        "tokens_saved": 1.0 - held_out[child.ask.name].tokens_mean / reasoner.tokens_mean,
        "hypervolume": volumes[0],
        "hypervolume_line": volumes[1],
        "hypervolume_ratio_over_line": volumes[0] / volumes[1],
        "hypervolume_ratio_interval": bootstrap_ratio(ours, theirs, scale),
        "line_points_on_held_out_front": [n for n, on in zip(interior, on_front, strict=True) if on],
        "average_on_held_out_front": bool(
            nondominated(np.array([*(losses(s) for s in ours), losses(held_out["average"])]))[-1]
            and "average" not in members
        ),
        "front": {name: describe(score) for name, score in members.items()},
    }


def child_of(front: Front) -> Row:
    """The most accurate member, on the search split, with at most 70% of the reasoner's tokens."""
    reasoner = next(row for row in front.parents if row.ask.name == "reasoner")
    return front.pick(f"max-tokens={0.7 * (reasoner.search.summary or {})['tokens_mean']}")


def main() -> None:
    """Run what is missing, then judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/proof"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    arguments = parser.parse_args()
    judged = [*(f"search-{seed}" for seed in SEEDS), "random-0"]
    names = ["swaps", "line", *judged]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(run, names, [arguments.out] * len(names)))
    runs = {name: Search.open(arguments.out / name) for name in names}
    line = line_scores(runs["line"])
    parents = ("reasoner", "concise")
    results = {
        "machine": f"{platform.machine()}, CPU, {platform.python_implementation()} {platform.python_version()}",
        "parents": {name: describe(line[name]) for name in parents},
        "line": {name: describe(score) for name, score in line.items() if name not in parents},
        "swaps": {name: describe(score) for name, score in scores(runs["swaps"]).items() if name not in parents},
        **{name: judge(runs[name], line) for name in judged},
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    for name in judged:
        r = results[name]
        print(
            f"{name}: child {r['child']['accuracy']:.3f} ± {r['child']['accuracy_stderr']:.3f} at "
            f"{r['child']['tokens_mean']:.1f} tokens ({r['tokens_saved']:.0%} saved), minus reasoner "
            f"{r['child_minus_reasoner']['difference']:+.4f} (95% from {r['child_minus_reasoner']['low']:+.4f}); "
            f"hypervolume {r['hypervolume_ratio_over_line']:.3f} x the line's "
            f"({r['hypervolume_ratio_interval'][0]:.3f} to {r['hypervolume_ratio_interval'][1]:.3f}); "
            f"line points on the front: {r['line_points_on_held_out_front'] or 'none'}"
        )


if __name__ == "__main__":
    main()
