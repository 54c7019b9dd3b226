"""The table and the picture of the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def table(results: dict[str, Any]) -> str:
    """The README's first table."""
    rows = {f"**as it comes ({_chosen(results['settings'])})**": results}
    rows |= {_chosen(r): r for r in results["curve"]}
    rows |= {f"race alone, tolerance {r['tolerance']:g}": r for r in results["race_alone"]}
    for changes in results["changed"]:
        name = next(key for key in results["settings"] if key in changes)
        rows[f"as it comes, but {name.replace('_', ' ')} {changes[name]:g}"] = changes
    rows |= {f"as it comes, search {i}": r for i, r in enumerate(results["by_search"])}
    rows |= {f"as it comes, {n} problems in all": r for n, r in results["by_size"].items()}
    rows |= {"*oracle of a race*": results["oracle"]}
    titles = {"evo_l2s": "Evo-L2S", "merge3": "MERGE3's estimator"}
    rows |= {f"{title}, {n} problems": r for name, title in titles.items() for n, r in results[name].items()}
    return "\n".join(f"| {name} | {' | '.join(_cells(row))} |" for name, row in rows.items())


def _chosen(settings: dict[str, Any]) -> str:
    return f"{settings['chosen']} chosen, gain {settings['gain']:g}".replace("e-0", "e-")


def _cells(row: dict[str, Any]) -> list[str]:
    with_interval = [
        f"{100 * row[key]:.{d}f} ({100 * row[f'{key}_interval'][0]:.{d}f} to {100 * row[f'{key}_interval'][1]:.{d}f})"
        for key, d in (("tokens_fraction", 1), ("hypervolume_regret", 2))
    ]
    plain = [f"{100 * row[key]:.1f}" for key in ("tokens_fraction_live", "seconds_fraction")]
    ranks = [f"{row[key]:.3f}" for key in ("spearman_accuracy", "spearman_tokens")]
    return [with_interval[0], *plain, with_interval[1], *ranks]


def rounded(value: Any) -> Any:
    """The same with six decimals."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(value, 6) if isinstance(value, float) else value


def draw(results: dict[str, Any], path: Path) -> None:
    """Tokens against regret, and against the weaker Spearman, with intervals over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    sides = {
        f"proxy, {c} chosen": [r for r in results["curve"] if r["chosen"] == c]
        for c in sorted({r["chosen"] for r in results["curve"]})
    }
    sides |= {"race alone": results["race_alone"]}
    sides |= {"Evo-L2S": list(results["evo_l2s"].values()), "MERGE3": list(results["merge3"].values())}
    for (label, rows), marker in zip(sides.items(), "osv^xD", strict=True):
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
    axes[0].set_yscale("symlog", linthresh=1.0)
    axes[0].set_ylim(bottom=0)
    axes[0].set_yticks([0, 0.5, 1, 2, 5, 10], ["0", "0.5", "1", "2", "5", "10"])
    axes[1].axhline(0.95, color="grey", linestyle=":")
    axes[1].set(xlabel="tokens, % of full evaluation", ylabel="Spearman, the weaker of accuracy and tokens")
    for axis in axes:
        axis.axvline(10, color="grey", linestyle=":")
        axis.set_xlim(left=0)
    axes[0].legend()
    figure.savefig(path, dpi=120)
