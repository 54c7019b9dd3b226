"""The proxy replayed on candidates that were once asked everything, beside full evaluation and two rivals.

    python experiments/proxy/proof.py                         # replays recording.npz: minutes, no model
    python experiments/proxy/proof.py --runs DIR              # first makes that file anew, of what record.py wrote

Recorded are one or more searches, random search, and the line between the parents. Each of 20 seeds interleaves a
searched run (in the order in which it was proposed) with the random one by lot, and draws the order of problems anew.
Writes results.json and curve.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from picture import draw, rounded, table
from recording import Floats, Pool, Recorded
from study import Study
from ways import Outcome, evo_l2s, merge3, oracle, proxied

from evo.config import ProxyConfig
from evo.proxy import MEANWHILE
from fitness.proxy import racing

HERE = Path(__file__).parent
RECORDING = HERE / "recording.npz"
SEEDS = range(20)
AS_IT_COMES = ProxyConfig.model_validate({})
DEFAULT = {name: getattr(AS_IT_COMES, name) for name in ("chosen", "tolerance", "alpha", "gain")}
DEFAULT |= {"meanwhile": MEANWHILE, "line_points": 3}
CHOSEN = (16, 32, 48)
GAINS = (3e-3, 1e-3, 1e-4, 2e-5, 5e-6)
TOLERANCES = (0.01, 0.02, 0.04)
SUBSETS = (10, 20, 50)


def proxied_with(**changes: Any) -> tuple[Callable[[Pool, Floats, Floats, int], Outcome], int]:
    """The proxy with some settings changed, and its number of line points."""
    settings = {**DEFAULT, **changes}
    line_points = settings.pop("line_points")
    return lambda pool, references, box, seed: proxied(pool, references, box, seed, **settings), line_points


def main() -> None:
    """Replay, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder of runs to make recording.npz of")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    arguments = parser.parse_args()
    if arguments.runs:
        Recorded.of(arguments.runs).save(RECORDING)
    recorded = Recorded.load(RECORDING)
    study = Study(recorded, range(arguments.seeds))
    results: dict[str, Any] = {"settings": {**DEFAULT, "growth": racing.GROWTH, "seeds": arguments.seeds}}

    def report(name: str, found: dict[str, Any]) -> dict[str, Any]:
        shown = ("tokens_fraction", "tokens_fraction_live", "seconds_fraction", "hypervolume_regret")
        line = ", ".join(f"{key} {found[key]:.4f}" for key in (*shown, "spearman_accuracy", "spearman_tokens"))
        print(f"{name:32} {line}", flush=True)
        return found

    def proxy(n: int | None = None, of: Study = study, **changes: Any) -> dict[str, Any]:
        way, line_points = proxied_with(**changes)
        name = ", ".join(f"{key} {value}" for key, value in changes.items()) or "as it comes"
        found = report(name, of.replay(way, line_points=line_points, n=n))
        return {**changes, **found}

    results |= proxy()
    results["spearman_ceiling"] = study.ceiling()
    results["curve"] = [proxy(chosen=c, gain=g) for c in CHOSEN for g in GAINS]
    results["race_alone"] = [proxy(gain=0.0, tolerance=t) for t in TOLERANCES]
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
    results["oracle"] = report(
        "oracle",
        study.replay(
            lambda *data: oracle(*data, chosen=DEFAULT["chosen"], tolerance=DEFAULT["tolerance"]),
            line_points=DEFAULT["line_points"],
        ),
    )
    results["changed"] = [
        proxy(line_points=9),
        proxy(chosen=0),
        proxy(meanwhile=1.0),
        proxy(meanwhile=0.005),
        proxy(alpha=0.5),
        proxy(tolerance=0.02),
    ]
    n_problems = recorded.parents.losses.shape[1]
    results["by_size"] = {
        str(n): {**proxy(n=n), "spearman_ceiling": study.ceiling(n)} for n in (n_problems // 4, n_problems // 2)
    }
    results["by_search"] = [
        proxy(of=Study(recorded, range(i, arguments.seeds, len(recorded.searched))))
        for i in range(len(recorded.searched))
    ]
    path = HERE / "results.json"
    live = json.loads(path.read_text()).get("live") if path.exists() else None  # of live.py
    path.write_text(json.dumps(rounded({**results, **({"live": live} if live else {})}), indent=1) + "\n")
    draw(results, HERE / "curve.png")
    print(table(results))


if __name__ == "__main__":
    main()
