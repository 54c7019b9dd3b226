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
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evo.config import Config
from evo.ledger import Ledger
from evo.pareto import Scale, nondominated
from evo.types import Origin
from fitness.objectives import per_problem
from fitness.proxy import racing
from fitness.proxy.irt import ItemResponse
from fitness.proxy.kriging import Kriging
from fitness.proxy.order import choose
from fitness.proxy.racing import Race, looks
from fitness.types import Split

HERE = Path(__file__).parent
OBJECTIVES = ("error", "tokens")
NAMES = ("search-0", "search-1", "search-2", "random-0", "line")
SEEDS = range(20)
DEFAULT = {"chosen": 16, "tolerance": 0.01, "alpha": 0.1, "line_points": 9}
TOLERANCES = (0.01, 0.02, 0.04)
CHOSEN = (8, 16)
SUBSETS = (10, 20, 50)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pool:
    """Recorded outcomes; N candidates, P problems, losses (error, tokens)."""

    losses: Floats
    """(N, P, 2), in the order of proposal."""
    truncated: Floats
    """Share of answers that were cut off, (N,)."""
    seconds: Floats
    """What each took to write and to generate, (N,)."""

    def take(self, candidates: NDArray[np.int64], problems: NDArray[np.int64] | slice = slice(None)) -> Pool:
        """Some candidates, on some problems."""
        return Pool(self.losses[candidates][:, problems], self.truncated[candidates], self.seconds[candidates])


def read(folder: Path) -> tuple[Config, Pool, Pool]:
    """A run's config, its two parents, and what it proposed."""
    with closing(Ledger.open(folder, read_only=True)) as ledger:
        config = Config.model_validate(ledger.meta("config"))
        origin = {ask.id: ask.origin for ask in ledger.asks()}
        entries = [entry for entry in ledger.entries(Split.SEARCH) if entry.measured]
        whole = Pool(
            np.array([per_problem(ledger.score(entry), OBJECTIVES) for entry in entries]),
            np.array([(entry.summary or {})["truncated"] for entry in entries]),
            np.array([entry.detail["generate_seconds"] for entry in entries]),
        )
    where = {kind: np.array([i for i, e in enumerate(entries) if origin[e.candidate_id] is kind]) for kind in Origin}
    return config, whole.take(where[Origin.PARENT]), whole.take(where[Origin.SEARCH])


@dataclass(frozen=True)
class Recorded:
    """What the replays draw from."""

    parents: Pool
    line: Pool
    searched: tuple[Pool, ...]
    random: tuple[Pool, ...]

    @classmethod
    def of(cls, folders: Iterable[Path]) -> Recorded:
        """Sorted by their configs' optimizers."""
        kinds: dict[str, list[Pool]] = {"line_sweep": [], "random": [], "searched": []}
        for folder in folders:
            config, parents, pool = read(folder)
            kinds.get(config.optimizer.kind, kinds["searched"]).append(pool)
        if not all(kinds.values()):
            raise SystemExit("expected a searched run, a random one and a line sweep; see --record")
        return cls(parents, kinds["line_sweep"][0], tuple(kinds["searched"]), tuple(kinds["random"]))

    def references(self, line_points: int) -> Floats:
        """Losses of the parents and of interior points of the line, evenly spaced, (R, P, 2)."""
        at = np.linspace(0, len(self.line.losses) - 1, line_points + 2).round().astype(int)[1:-1]
        return np.concatenate([self.parents.losses, self.line.losses[at]])

    def pool(self, seed: int) -> Pool:
        """A searched run and a random one, interleaved by lot, each in its own order."""
        parts = [self.searched[seed % len(self.searched)], self.random[seed % len(self.random)]]
        place = np.random.default_rng(seed).permutation(np.repeat([0, 1], [len(p.losses) for p in parts]))
        order = np.empty(len(place), int)
        for i, first in enumerate((0, len(parts[0].losses))):
            order[place == i] = first + np.arange((place == i).sum())
        fields = zip(*[(p.losses, p.truncated, p.seconds) for p in parts], strict=True)
        return Pool(*map(np.concatenate, fields)).take(order)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Outcome:
    """What a way of evaluating made of a pool."""

    tokens: Floats
    """That each candidate cost, (N,)."""
    extra_tokens: float
    """References and confirmations."""
    estimates: Floats
    """Last estimates before the full split, (N, 2)."""
    selected: Floats
    """Mean losses on the full split of those that make up its front, (K, 2)."""
    seconds: float = 0.0
    """Estimated time to generate, references included."""
    notes: tuple[tuple[str, float], ...] = ()


def clock(pool: Pool) -> Callable[[Floats], float]:
    """Seconds of a block from its tokens, (n,): a step for the longest answer, and a share for each token.

    Fitted to the recorded evaluations, of one batch each.
    """
    tokens = pool.losses[:, :, 1]
    design = np.column_stack([tokens.max(axis=1), tokens.sum(axis=1)])
    a, b = np.maximum(np.linalg.lstsq(design, pool.seconds, rcond=None)[0], 0.0)
    return lambda block: float(a * block.max() + b * block.sum())


def proxied(
    pool: Pool, references: Floats, box: Floats, seed: int, *, chosen: int, tolerance: float, alpha: float
) -> Outcome:
    """Chosen problems and the race; see fitness.proxy."""
    n = references.shape[1]
    order = choose(references, chosen, seed)
    floor = np.stack([np.zeros(n), references[:, :, 1].min(axis=0)], axis=1)
    race, estimator = Race(order, tolerance * box, floor, alpha), Kriging(references)
    ends, seconds = looks(chosen or 16, n), clock(pool)
    members = _front(references)
    tokens, estimates, spent, n_full, n_false = [], [], 0.0, 0, 0
    decide = 0.0
    for losses in pool.losses:
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            asked = order.problems[:end]
            spent += seconds(losses[order.problems[start:end], 1])
            if end == n:
                members, n_full = _front(np.concatenate([members, losses[None]])), n_full + 1
                break
            before = time.perf_counter()
            beaten = race.beaten_by(losses[asked], members)
            estimate = estimator.estimate(asked, losses[asked])
            decide += time.perf_counter() - before
            if beaten is not None:
                better = losses.mean(axis=0) < members.mean(axis=1) - tolerance * box
                n_false += bool(better.any(axis=1).all())
                break
        tokens.append(losses[asked if end < n else slice(None), 1].sum())
        estimates.append(estimate)
    spent += sum(seconds(reference[:, 1]) for reference in references)
    return Outcome(
        np.array(tokens), references[:, :, 1].sum(), np.array(estimates), members.mean(axis=1), spent,
        (("full_share", n_full / len(pool.losses)), ("wrongly_stopped_share", n_false / len(pool.losses)),
         ("decision_seconds", decide / len(pool.losses))),
    )  # fmt: skip


def fixed_subset(
    pool: Pool, references: Floats, problems: NDArray[np.int64], estimate: Callable[[Floats], Floats]
) -> Outcome:
    """Every candidate on the same problems; those that look best are then asked everything, to confirm them."""
    estimates = np.array([estimate(losses[problems]) for losses in pool.losses])
    full = pool.losses.mean(axis=1)
    everything = np.concatenate([references.mean(axis=1), full])
    looks_best = np.flatnonzero(nondominated(np.concatenate([references.mean(axis=1), estimates])))
    confirmed = pool.losses[looks_best[looks_best >= len(references)] - len(references)]
    rest = np.setdiff1d(np.arange(pool.losses.shape[1]), problems)
    extra = references[:, :, 1].sum() + confirmed[:, rest, 1].sum()
    seconds = clock(pool)
    spent = sum(seconds(losses[problems, 1]) for losses in pool.losses)
    spent += sum(seconds(losses[:, 1]) for losses in (*references, *confirmed))
    return Outcome(pool.losses[:, problems, 1].sum(axis=1), extra, estimates, everything[looks_best], spent)


def evo_l2s(pool: Pool, references: Floats, n: int, seed: int) -> Outcome:
    """Evo-L2S (arXiv 2604.06465): the n problems of highest entropy over the references' answers, ties by lot."""
    p = references[:, :, 0].mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.nan_to_num(-p * np.log(p) - (1 - p) * np.log(1 - p))
    problems = np.lexsort((np.random.default_rng(seed).random(len(p)), -entropy))[:n]
    return fixed_subset(pool, references, problems, lambda seen: seen.mean(axis=0))


def merge3(pool: Pool, references: Floats, n: int, seed: int) -> Outcome:
    """MERGE3 (arXiv 2502.10436): n representatives of clusters of items, and gmp-IRT."""
    estimator = ItemResponse(references, 2, OBJECTIVES)
    problems, weights = _representatives(estimator.items, n, np.random.default_rng(seed))
    return fixed_subset(pool, references, problems, lambda seen: estimator.estimate(problems, seen, weights))


def _representatives(
    points: Floats, n: int, rng: np.random.Generator, rounds: int = 20
) -> tuple[NDArray[np.int64], Floats]:
    """K-means; of each cluster the point nearest to its middle, and its share of the points."""
    centers = points[rng.choice(len(points), n, replace=False)]
    for _ in range(rounds):
        distance = ((points[:, None] - centers) ** 2).sum(axis=2)
        nearest = distance.argmin(axis=1)
        centers = np.array(
            [points[nearest == k].mean(axis=0) if (nearest == k).any() else centers[k] for k in range(n)]
        )
    found = [np.flatnonzero(nearest == k) for k in range(n)]
    kept = [k for k in range(n) if len(found[k])]
    problems = np.array([found[k][distance[found[k], k].argmin()] for k in kept])
    return problems, np.array([len(found[k]) for k in kept], float)


def judge(outcome: Outcome, pool: Pool, parents: Floats, scale: Scale) -> dict[str, float]:
    """The figures that the issue asks for."""
    full = pool.losses.mean(axis=1)
    live = (1 - full[:, 0] > (1 - parents[:, :, 0].mean(axis=1)).min() - 0.1) & (pool.truncated < 0.1)
    all_tokens, parent_tokens = pool.losses[:, :, 1].sum(axis=1), parents[:, :, 1].sum()
    best = scale.hypervolume(np.concatenate([full, parents.mean(axis=1)]))
    seconds = clock(pool)
    all_seconds = sum(seconds(losses[:, 1]) for losses in (*pool.losses, *parents))
    error = outcome.estimates[live] - full[live]
    return {
        "tokens_fraction": (outcome.tokens.sum() + outcome.extra_tokens) / (all_tokens.sum() + parent_tokens),
        "tokens_fraction_live": (outcome.tokens[live].sum() + outcome.extra_tokens)
        / (all_tokens[live].sum() + parent_tokens),
        "hypervolume_regret": 1.0 - scale.hypervolume(outcome.selected) / best,
        "spearman_accuracy": spearman(outcome.estimates[live, 0], full[live, 0]),
        "spearman_tokens": spearman(outcome.estimates[live, 1], full[live, 1]),
        "bias_accuracy": -float(error[:, 0].mean()),
        "bias_tokens": float(error[:, 1].mean()),
        "seconds_fraction": outcome.seconds / all_seconds,
        "n_candidates": float(len(full)),
        "n_live": float(live.sum()),
        **dict(outcome.notes),
    }


def ceiling(pool: Pool, parents: Floats, seed: int) -> dict[str, float]:
    """Spearman between a random half of the problems and the other half, and between it and the whole."""
    full = pool.losses.mean(axis=1)
    live = (1 - full[:, 0] > (1 - parents[:, :, 0].mean(axis=1)).min() - 0.1) & (pool.truncated < 0.1)
    shuffled = pool.losses[live][:, np.random.default_rng(seed).permutation(pool.losses.shape[1])]
    half, other = (part.mean(axis=1) for part in np.array_split(shuffled, 2, axis=1))
    return {
        f"{against}_{name}": spearman(half[:, m], to[:, m])
        for against, to in (("half", other), ("whole", full[live]))
        for m, name in enumerate(("accuracy", "tokens"))
    }


def spearman(a: Floats, b: Floats) -> float:
    """Correlation of ranks, ties sharing their mean rank; equal up to 1e-9 counts as a tie."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Floats) -> Floats:
    _, index, count = np.unique(values.round(9), return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[index]


def _front(losses: Floats) -> Floats:
    return losses[nondominated(losses.mean(axis=1))]


def summary(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean and 95% interval over seeds of every figure."""
    found = {}
    for key in rows[0]:
        values = np.array([row[key] for row in rows])
        found[key] = float(values.mean())
        found[f"{key}_interval"] = [float(q) for q in np.quantile(values, [0.025, 0.975])]
    return found


class Study:
    """All replays of one recording."""

    def __init__(self, recorded: Recorded, seeds: Iterable[int]) -> None:
        self._recorded, self._seeds = recorded, list(seeds)

    def replay(
        self, way: Callable[[Pool, Floats, Floats, int], Outcome], *, line_points: int, n: int | None = None
    ) -> dict[str, Any]:
        """One way of evaluating over all seeds.

        Args:
            way: (pool, references, box, seed) -> Outcome.
            line_points: among the references.
            n: problems of the split, drawn by lot; None: all that were recorded.
        """
        return summary([self._one(way, seed, line_points, n) for seed in self._seeds])

    def ceiling(self, n: int | None = None) -> dict[str, Any]:
        """See the function of that name."""
        found = []
        for seed in self._seeds:
            pool, parents = self._on(seed, self._recorded.parents.losses, n)
            found.append(ceiling(pool, parents, seed))
        return summary(found)

    def _one(
        self, way: Callable[[Pool, Floats, Floats, int], Outcome], seed: int, line_points: int, n: int | None
    ) -> dict[str, float]:
        pool, references = self._on(seed, self._recorded.references(line_points), n)
        parents = references[: len(self._recorded.parents.losses)]
        scale = Scale.of_parents(OBJECTIVES, parents.mean(axis=1))
        return judge(way(pool, references, scale.reference, seed), pool, parents, scale)

    def _on(self, seed: int, references: Floats, n: int | None) -> tuple[Pool, Floats]:
        pool = self._recorded.pool(seed)
        n_problems = references.shape[1]
        problems = np.random.default_rng(1000 + seed).permutation(n_problems)[: n or n_problems]
        return pool.take(np.arange(len(pool.losses)), problems), references[:, problems]


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
    study = Study(Recorded.of(arguments.runs), range(arguments.seeds))
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
    results["line_points"] = {"3": proxy("line points 3", line_points=3)}
    results["no_chosen"] = proxy("no chosen problems", chosen=0)
    n_problems = study._recorded.parents.losses.shape[1]
    results["by_size"] = {
        str(n): {**proxy(f"{n} problems", n=n), "spearman_ceiling": study.ceiling(n)}
        for n in (n_problems // 4, n_problems // 2)
    }
    (HERE / "results.json").write_text(json.dumps(rounded(results), indent=1) + "\n")
    draw(results, HERE / "curve.png")
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """The README's first table."""
    rows = {"as it comes": results}
    rows |= {f"proxy, {r['chosen']} chosen, tolerance {r['tolerance']:g}": r for r in results["curve"]}
    rows |= {"none chosen": results["no_chosen"], "3 line points": results["line_points"]["3"]}
    rows |= {f"{name}, {n} problems": r for name in ("evo_l2s", "merge3") for n, r in results[name].items()}
    return "\n".join(f"| {name} | {' | '.join(_cells(row))} |" for name, row in rows.items())


def _cells(row: dict[str, Any]) -> list[str]:
    with_interval = [
        f"{100 * row[key]:.{d}f} ({100 * row[f'{key}_interval'][0]:.{d}f} to {100 * row[f'{key}_interval'][1]:.{d}f})"
        for key, d in (("tokens_fraction", 1), ("hypervolume_regret", 2))
    ]
    plain = [f"{100 * row[key]:.1f}" for key in ("tokens_fraction_live", "seconds_fraction")]
    ranks = [f"{row[key]:.3f}" for key in ("spearman_accuracy", "spearman_tokens")]
    return [with_interval[0], *plain, with_interval[1], *ranks]


def rounded(value: Any) -> Any:
    """The same with five decimals."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(value, 5) if isinstance(value, float) else value


def draw(results: dict[str, Any], path: Path) -> None:
    """Tokens against regret, and against the weaker Spearman, with intervals over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    sides = {f"proxy, {c} chosen": [r for r in results["curve"] if r["chosen"] == c] for c in CHOSEN}
    sides |= {"Evo-L2S": list(results["evo_l2s"].values()), "MERGE3": list(results["merge3"].values())}
    for (label, rows), marker in zip(sides.items(), "osxD", strict=True):
        x = [100 * r["tokens_fraction"] for r in rows]
        for axis, keys, unit in (
            (axes[0], ["hypervolume_regret"], 100),
            (axes[1], ["spearman_accuracy", "spearman_tokens"], 1),
        ):
            weaker = [min(keys, key=lambda key, r=r: r[key]) for r in rows]
            y = np.array([unit * r[key] for r, key in zip(rows, weaker, strict=True)])
            low, high = np.array([unit * np.array(r[f"{k}_interval"]) for r, k in zip(rows, weaker, strict=True)]).T
            axis.errorbar(
                x, y, [np.maximum(y - low, 0), np.maximum(high - y, 0)], marker=marker, capsize=2, label=label
            )
    axes[0].axhline(1, color="grey", linestyle=":")
    axes[0].set(xlabel="tokens, % of full evaluation", ylabel="hypervolume regret, %")
    axes[1].axhline(0.95, color="grey", linestyle=":")
    axes[1].set(xlabel="tokens, % of full evaluation", ylabel="Spearman, the weaker of accuracy and tokens")
    for axis in axes:
        axis.axvline(10, color="grey", linestyle=":")
        axis.set_xlim(left=0)
    axes[0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
