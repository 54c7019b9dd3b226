"""The proxy replayed on candidates that were once asked everything, beside full evaluation and two rivals.

    python experiments/proxy/proof.py --record [--jobs 2]     # first makes the runs that are missing in runs/proof
    python experiments/proxy/proof.py [--runs DIR ...]        # replays what is there: minutes, numpy only

Reads per-problem outcomes from the ledgers of finished searches without a proxy: one or more searches, random
search, and the line between the parents. Each of 20 seeds interleaves a searched run (in the order in which it was
proposed) with the random one by lot, and draws the order of problems anew. Writes results.json and curve.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from picture import draw, rounded, table
from recording import Floats, Pool, Recorded
from study import Study
from ways import Outcome, evo_l2s, merge3, oracle, proxied

from fitness.proxy import racing

HERE = Path(__file__).parent
NAMES = ("search-0", "search-1", "search-2", "random-0", "line")
SEEDS = range(20)
DEFAULT = {"chosen": 16, "tolerance": 0.01, "alpha": 0.1, "line_points": 9}
TOLERANCES = (0.01, 0.02, 0.04)
ALPHAS = (0.5, 0.9)
CHOSEN = (8, 16)
SUBSETS = (10, 20, 50)


def proxied_with(**changes: Any) -> tuple[Callable[[Pool, Floats, Floats, int], Outcome], int]:
    """The proxy with some settings changed, and its number of line points."""
    settings = {**DEFAULT, **changes}
    line_points = settings.pop("line_points")
    return lambda pool, references, box, seed: proxied(pool, references, box, seed, **settings), line_points


def main() -> None:
    """Record if asked to, replay, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", default=[Path("runs/proof") / name for name in NAMES])
    parser.add_argument("--record", action="store_true", help="first make the runs of experiments/chimera_mini")
    parser.add_argument("--jobs", type=int, default=1, help="recordings at a time")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    arguments = parser.parse_args()
    if arguments.record:
        command = [sys.executable, HERE.parent / "chimera_mini/proof.py", "--out", arguments.runs[0].parent]
        subprocess.run([*map(str, command), "--jobs", str(arguments.jobs)], check=True)
    recorded = Recorded.of(arguments.runs)
    study = Study(recorded, range(arguments.seeds))
    results: dict[str, Any] = {"settings": {**DEFAULT, "growth": racing.GROWTH, "seeds": arguments.seeds}}

    def report(name: str, found: dict[str, Any]) -> dict[str, Any]:
        shown = ("tokens_fraction", "tokens_fraction_live", "seconds_fraction", "hypervolume_regret")
        line = ", ".join(f"{key} {found[key]:.4f}" for key in (*shown, "spearman_accuracy", "spearman_tokens"))
        print(f"{name:32} {line}", flush=True)
        return found

    def proxy(name: str, n: int | None = None, **changes: Any) -> dict[str, Any]:
        way, line_points = proxied_with(**changes)
        return report(name, study.replay(way, line_points=line_points, n=n))

    curve = [
        {"tolerance": t, "chosen": c, **proxy(f"tolerance {t}, chosen {c}", tolerance=t, chosen=c)}
        for c in CHOSEN
        for t in TOLERANCES
    ]
    results |= next(r for r in curve if all(r[key] == DEFAULT[key] for key in ("tolerance", "chosen")))
    results["spearman_ceiling"] = study.ceiling()
    for name, rival in (("evo_l2s", evo_l2s), ("merge3", merge3)):
        results[name] = {
            str(k): report(
                f"{name}, {k} problems",
                study.replay(
                    lambda pool, references, _, seed, k=k, rival=rival: rival(pool, references, k, seed),
                    line_points=DEFAULT["line_points"],
                ),
            )
            for k in SUBSETS
        }
    results["curve"] = curve
    results["oracle"] = report(
        "oracle",
        study.replay(
            lambda *data: oracle(*data, chosen=DEFAULT["chosen"], tolerance=DEFAULT["tolerance"]),
            line_points=DEFAULT["line_points"],
        ),
    )
    results["by_alpha"] = {
        f"{a}, tolerance {t}": proxy(f"alpha {a}, tolerance {t}", alpha=a, tolerance=t)
        for a in ALPHAS
        for t in TOLERANCES[:2]
    }
    results["line_points"] = {"3": proxy("line points 3", line_points=3)}
    results["no_chosen"] = proxy("no chosen problems", chosen=0)
    n_problems = recorded.parents.losses.shape[1]
    results["by_size"] = {
        str(n): {**proxy(f"{n} problems", n=n), "spearman_ceiling": study.ceiling(n)}
        for n in (n_problems // 4, n_problems // 2)
    }
    path = HERE / "results.json"
    live = json.loads(path.read_text()).get("live") if path.exists() else None  # of live.py
    path.write_text(json.dumps(rounded({**results, **({"live": live} if live else {})}), indent=1) + "\n")
    draw(results, HERE / "curve.png")
    print(table(results))


if __name__ == "__main__":
    main()
