"""A run in Markdown: how it stands, its front as a table, what to type next, and what its models write."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from evo.config import Config
from evo.front import Row, percent, spread
from evo.tracking.generations import TOLERANCE, Record
from evo.types import Status
from fitness.types import Split

_MAX_MEMBERS = 25  # MLflow cuts the page off at 8,000 characters


def overview(record: Record, config: Config, folder: Path, state: str) -> str:
    """The page.

    Args:
        record: of the run.
        config: of the run.
        folder: of the run, for the commands.
        state: "running", "finished" or "stopped".
    """
    front, failed = record.front, sum(entry.status is Status.FAILED for entry in record.latest)
    infeasible = sum(bool(entry.violations) for entry in record.latest)
    n_parked = sum(entry.parked for entry in record.latest)
    n_stopped = sum(entry.status is Status.PARTIAL for entry in record.latest) - n_parked
    stopped = (f", {n_parked} parked" if n_parked else "") + (f", {n_stopped} stopped early" if n_stopped else "")
    n_genes = next((f", {len(ask.genome)} genes" for ask in record.asks if ask.genome is not None), "")
    asked = max((ask.generation for ask in record.asks), default=0)
    lines = [
        f"**{state.capitalize()}** in generation {asked}: {len(record.entries)} models evaluated "
        f"({infeasible} infeasible, {failed} failed{stopped}), {len(front.members)} on the front, "
        f"hypervolume {front.hypervolume:.4f}.",
        "",
        f"`{config.optimizer.kind}` searches the space `{config.space.kind}` (`{config.space.method}`{n_genes}) "
        f"between {' and '.join(config.parents)}, on the task `{config.task.kind}`, seed {config.seed}.",
        "",
    ]
    if front.members:
        shown = spread(front.members, _MAX_MEMBERS)
        some = f", {len(shown)} of {len(front.members)} shown" if len(shown) < len(front.members) else ""
        lines += [f"### The front{some}", "", *_table(shown), ""]
    members = {row.ask.id for row in front.members}
    plain = [row for row in (*front.parents, *front.baselines) if row.ask.id not in members]
    if plain:
        shown = spread(plain, _MAX_MEMBERS)
        lines += ["### Parents and baselines that are not on it", "", *_table(shown), ""]
    return "\n".join(lines + _footer(folder))


def member_page(row: Row, folder: Path) -> str:
    """A member of the front in a few lines."""
    scores = []
    for split in (Split.SEARCH, Split.HELD_OUT):
        found = row.to_dict(split)
        if found["accuracy"] is not None:
            scores.append(f"{percent(found)} % at {found['tokens_mean']:.1f} tokens ({split.replace('_', ' ')})")
    command = f"mergefront export {shlex.quote(str(folder))} --pick {row.ask.name} --out my-model"
    return f"On the front: {'; '.join(scores)}.\n\n```\n{command}\n```"


def samples_page(row: Row) -> str:
    """What a model wrote for a few problems of the search split, to be read by a person."""
    lines = [f"# {row.ask.name}: samples from the search split", ""]
    for i, sample in enumerate(row.search.detail.get("samples", ()), start=1):
        lines += [
            f"## {i}. {sample['verdict']}, {sample['n_tokens']} tokens",
            "",
            f"- question: {sample['question']}",
            f"- expected: {sample['answer']}",
            "",
            "````",
            sample["completion"],
            "````",
            "",
        ]
    return "\n".join(lines)


def _footer(folder: Path) -> list[str]:
    return [
        "Members are chosen on the search split, which flatters them; held-out scores were never selected on.",
        "",
        "### To export a model",
        "",
        "```",
        f"mergefront export {shlex.quote(str(folder))} --pick knee --out my-model",
        f"mergefront export {shlex.quote(str(folder))} --pick NAME --out my-model",
        "```",
        "",
        f"Metrics: `best/tokens` is the fewest mean tokens on the front at the best parent's accuracy less "
        f"{100 * TOLERANCE:g} points; `knee/` is the member nearest to no errors and no tokens; `gen/` is the "
        "generation alone, `proxy/` all up to it. Child runs are the front's members, each with its `recipe.yaml`.",
    ]


def _table(rows: Sequence[Row]) -> list[str]:
    """Scores on the search split; beside them those on the held-out one, once there are any."""
    held_out = any(row.held_out for row in rows)
    head = ["model", "accuracy %", "tokens", "cut off %", *(["held-out accuracy %", "held-out tokens"] * held_out)]
    lines = ["| " + " | ".join(head) + " |", "|:--|" + "--:|" * (len(head) - 1)]
    for row in rows:
        here, there = row.to_dict(Split.SEARCH), row.to_dict(Split.HELD_OUT)
        cells = [row.ask.name, percent(here), f"{here['tokens_mean']:.1f}", f"{100 * here['truncated']:.1f}"]
        if held_out:
            cells += ["", ""] if there["accuracy"] is None else [percent(there), f"{there['tokens_mean']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
