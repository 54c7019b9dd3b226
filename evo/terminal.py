"""What a person sees in the terminal: live progress, the table of the front, the state of a run.

Live on a terminal; one line an evaluation elsewhere (logs, CI).
"""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from evo.config import Budget
from evo.front import Front, Row, percent, spread
from evo.history import History
from evo.ledger import Entry, Ledger
from evo.run_folder import holder, is_held
from evo.types import Status
from fitness.types import Split

if TYPE_CHECKING:  # they take a second, which `status` has no need of
    from evo.loop import Progress as Event
    from evo.loop import Watcher
    from evo.search import Search

PICTURE_FILE = "front.png"


@contextmanager
def watching(search: Search, *, quiet: bool = False) -> Iterator[Watcher | None]:
    """A watcher that shows each evaluation as it comes."""
    console = Console(stderr=quiet)
    if quiet:
        yield None
    elif console.is_terminal:
        console.print(f"[dim]run folder {escape(str(search.folder))}; Ctrl-C stops, the same command goes on[/dim]")
        with Live(console=console, refresh_per_second=4) as live:
            yield _LiveWatcher(live)
            live.transient = True  # at the end the table is printed in full; of what is interrupted it stays
    else:
        started = time.monotonic()
        yield lambda event: print(_line(event, time.monotonic() - started), flush=True)


class _LiveWatcher:
    """A progress bar over the budget above the front so far."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), expand=False
        )
        self._task = self._bar.add_task("search", total=1.0)
        self._started, self._first = time.monotonic(), None

    def __call__(self, event: Event) -> None:
        history = event.history
        if event.entry.split is Split.HELD_OUT:
            shown = len(history.entries[Split.HELD_OUT])
            self._bar.update(
                self._task, completed=shown, total=shown + len(history.front.unscored()), description="held-out scores"
            )
        else:
            self._bar.update(self._task, completed=share_spent(history), description=_pace(history))
        grid = Table.grid()
        grid.add_row(self._bar)
        grid.add_row(front_table(history.front, held_out=event.entry.split is Split.HELD_OUT, limit=12))
        self._live.update(grid)


def share_spent(history: History) -> float:
    """How much of the budget is used, by the limit that is nearest."""
    return min(1.0, history.share_spent())


def front_table(front: Front, *, held_out: bool, limit: int | None = None) -> Table:
    """Members of the front, then parents and baselines that are not on it. Fits 80 columns.

    "correct" is the tokens of correct answers, "rep" the share of n-grams that were there before, "waits"
    self-corrections per 100 tokens.
    """
    title = f"Pareto front: {len(front.members)} of {len(front.evaluated)} models"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = ["id", "model", "accuracy %", "tokens", "p90", "cut off %"]
    columns += ["held-out %", "tokens", "drop"] if held_out else ["correct", "rep %", "waits"]
    for column in columns:  # a long name is folded, and nothing else
        justify: Literal["left", "right"] = "left" if column == "model" else "right"
        table.add_column(column, justify=justify, no_wrap=column != "model", overflow="fold")
    for row in front.members if limit is None else spread(front.members, limit):
        table.add_row(*_cells(row, held_out), style="bold" if row.ask.origin == "search" else "")
    on_front = {row.ask.id for row in front.members}
    others = [row for row in (*front.parents, *front.baselines) if row.ask.id not in on_front]
    if others:
        table.add_section()
        for row in others:
            table.add_row(*_cells(row, held_out), style="dim")
    return table


def print_front(front: Front, objectives: Sequence[str], *, held_out: bool) -> None:
    """The table of a front, in full, and its hypervolume."""
    console = Console(soft_wrap=True)
    console.width = max(console.width, 80)  # in fewer, columns would be left out: a terminal wraps the lines
    console.print(front_table(front, held_out=held_out))
    if not front.members:
        console.print(_why_empty(front), highlight=False)
    line = f"hypervolume {front.hypervolume:.4f} on the search split"
    if held_out and (there := front.hypervolume_on(Split.HELD_OUT)) is not None:
        line += f", {there:.4f} held out"
    if front.scale is not None:
        said = {"error": "error {:g}", "tokens": "{:.1f} tokens"}
        point = zip(objectives, front.scale.reference, strict=True)
        line += f" (reference point: {', '.join(said[name].format(value) for name, value in point)})"
    console.print(line, highlight=False)


def _why_empty(front: Front) -> str:
    """What keeps models off a front without members."""
    broken = Counter(name for row in front.evaluated for name in row.search.violations)
    said = ", ".join(f"{n} of {len(front.evaluated)} models violate {name!r}" for name, n in broken.most_common())
    return f"nothing is on the front: {said or 'no model has been scored'}. See `constraints`, and max_tokens."


def print_ending(front: Front, search: Search) -> None:
    """What a run ends with: the table, the picture, and what to type next."""
    from evo.picture import save_front

    scored = not front.unscored()
    print_front(front, search.config.objectives, held_out=scored)
    folder, quoted = search.folder, shlex.quote(str(search.folder))
    save_front(front, folder / PICTURE_FILE, title=folder.name, held_out=scored)
    console = Console(soft_wrap=True, highlight=False, markup=False)  # brackets of a folder's name are no markup
    console.print(f"\npicture   {folder / PICTURE_FILE}")
    if search.config.tracking.enabled:
        from evo.tracking.tracker import how_to_look, is_behind

        console.print(f"MLflow    {how_to_look(folder, search.config.tracking.uri)}")
        if is_behind(folder):
            console.print(f"          MLflow has not been told everything yet: mergefront sync {quoted}")
    if front.members:
        console.print(f"export    mergefront export {quoted} --pick knee --out my-model")
    if ended := search.ended:
        console.print(f"ended     {ended}; a larger budget changes nothing, other options in a new folder may")
    else:
        console.print(f"go on     the same command{_more_budget(folder)}")


def _more_budget(folder: Path) -> str:
    """What the command of a run needs to go on: a larger budget, if that is what ended it."""
    with closing(Ledger.open(folder, read_only=True)) as ledger:
        history = History(ledger)
    limits = history.budget.model_dump(exclude_none=True).items()
    reached = [f"{key}=N, N larger than {limit:g}" for key, limit in limits if history.share_spent(key) >= 1.0]
    return f" with --budget {' and '.join(reached)}" if reached else " goes on where this one was stopped"


def _proxy_line(stopped: Sequence[Entry], history: History) -> str:
    n_saved, n_collapsed = sum(entry.n_saved for entry in stopped), sum(entry.collapsed for entry in stopped)
    n_parked = sum(entry.parked for entry in stopped)
    share = n_saved / (n_saved + history.spent["tokens"])
    return (
        f"proxy {n_parked} parked, {len(stopped) - n_collapsed - n_parked} stopped in the race, "
        f"{n_collapsed} collapsed; about {n_saved:,} tokens ({share:.0%}) saved"
    )


def print_status(folder: Path) -> None:
    """The state of a run, read from its ledger without disturbing it."""
    with closing(Ledger.open(folder, read_only=True)) as ledger:
        history = History(ledger)
        versions, caveat, ended = (ledger.meta(key) for key in ("versions", "caveat", "ended"))
    front, searched = history.front, [history.latest(id) for id in history.entries[Split.SEARCH]]
    at_rest = "finished" if history.exhausted or ended else "stopped"
    state = f"running ({holder(folder)})" if is_held(folder) else at_rest
    n_failed = sum(entry.status is Status.FAILED for entry in searched)
    n_infeasible = sum(bool(entry.violations) for entry in searched)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{escape(str(folder))}: [bold]{state}[/bold], {share_spent(history):.0%} of the budget spent")
    console.print(_budget_line(history.budget, history.spent))
    console.print(f"evaluated {len(searched)}, failed {n_failed}, infeasible {n_infeasible}; {_pace(history)}")
    if stopped := [entry for entry in searched if entry.status is Status.PARTIAL]:
        console.print(_proxy_line(stopped, history))
    console.print(f"front {len(front.members)} models, hypervolume {front.hypervolume:.4f}")
    for note in filter(None, (ended, caveat)):
        console.print(f"note: {note}")
    console.print("[dim]" + ", ".join(f"{name} {version}" for name, version in versions.items()) + "[/dim]")


def _budget_line(budget: Budget, spent: dict[str, float]) -> str:
    limits = budget.model_dump()
    parts = [
        f"{key} {spent[key]:,.2f} of {limit:,g}" if key == "hours" else f"{key} {spent[key]:,.0f} of {limit:,}"
        for key, limit in limits.items()
        if limit is not None
    ]
    return "budget: " + "; ".join(parts)


def _pace(history: History) -> str:
    hours, tokens = history.spent["hours"], history.spent["tokens"]
    if not hours:
        return "starting"
    return f"{history.spent['candidates'] / hours:,.0f} candidates/h, {tokens / hours / 3600:,.0f} tokens/s"


def _line(event: Event, seconds: float) -> str:
    entry, history = event.entry, event.history
    where = f"{seconds:7.1f}s  {share_spent(history):4.0%}  {event.ask.name:<12}"
    if entry.parked:
        return f"{where} {entry.detail['reason']}"
    if entry.status is Status.PARTIAL or entry.summary is None:
        return f"{where} {'failed' if entry.status is Status.FAILED else 'stopped'}: {entry.detail.get('reason')}"
    score = entry.summary
    text = (
        f"{where} accuracy {score['accuracy']:.3f} ± {score['accuracy_stderr']:.3f}, tokens {score['tokens_mean']:.1f}"
    )
    if entry.split is Split.HELD_OUT:
        return f"{text}  (held out)"
    if entry.violations:
        text += f"  infeasible: {', '.join(entry.violations)}"
    return f"{text}  | front {len(history.front.members)}, hypervolume {history.front.hypervolume:.4f}"


def _cells(row: Row, held_out: bool) -> list[str]:
    s, h = row.to_dict(Split.SEARCH), row.to_dict(Split.HELD_OUT)
    cells = [str(row.ask.id), row.ask.name, percent(s), f"{s['tokens_mean']:.1f}", f"{s['tokens_p90']:.0f}"]
    cells.append(f"{100 * s['truncated']:.1f}")
    if not held_out:
        cells.append("-" if s["tokens_correct_mean"] is None else f"{s['tokens_correct_mean']:.1f}")
        repeats, waits = s["repeated_ngrams"], s["corrections_per_100"]  # None in runs of older versions
        return [*cells, "-" if repeats is None else f"{100 * repeats:.0f}", "-" if waits is None else f"{waits:.1f}"]
    if h["accuracy"] is None:
        return [*cells, "-", "-", "-"]
    return [*cells, percent(h), f"{h['tokens_mean']:.1f}", f"{100 * (s['accuracy'] - h['accuracy']):+.1f}"]
