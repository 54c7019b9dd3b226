"""The picture of a front: accuracy against mean output tokens.

Figures are made without pyplot, so nothing global is touched and any thread or process may draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from evo.front import Front, Row
from fitness.types import Split

_INK, _PALE = "#2b2f36", "#9aa3ae"
_FRONT, _PARENT, _BASELINE, _HELD_OUT = "#1f5fa8", "#c8374d", "#d98a1f", "#2f8f7a"
_SIZE = (9.0, 5.6)  # inches
_DPI = 130
_PLACES = [(d, dx, dy) for d, dx, dy in product((10, 17, 27), (1, 0, -1), (1, 0, -1)) if dx or dy]
"""Where a label may go: (distance in points, x direction, y direction)."""


@dataclass(frozen=True)
class _Points:
    """Columns of scores, N points."""

    tokens: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    """In percent, as its standard error."""
    tokens_stderr: NDArray[np.float64]
    accuracy_stderr: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.tokens)


def save_front(front: Front, path: str | Path, *, title: str, held_out: bool = False) -> None:
    """Draw a front into a file; its suffix (.png, .svg, .pdf) says which format."""
    draw_front(front, title=title, held_out=held_out).savefig(path)


def front_pixels(front: Front, *, title: str, held_out: bool = False) -> NDArray[np.uint8]:
    """Draw a front into an array of shape (height, width, 3)."""
    figure = draw_front(front, title=title, held_out=held_out)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_front(front: Front, *, title: str, held_out: bool = False) -> Figure:
    """Draw a front with its parents, its baselines and everything else that was evaluated.

    Args:
        front: may be empty.
        title: the first words above the picture; the figures of the front follow in a second line.
        held_out: link each member to its scores on the held-out split, where it has been scored there.
            The gap is the winner's curse: members were chosen for their luck on the search split, too.
    """
    figure = Figure(figsize=_SIZE, dpi=_DPI)
    axes = figure.add_axes((0.075, 0.105, 0.91, 0.775))  # fixed, so that pictures of a run can be leafed through
    _frame(axes, front, title)
    _limits(axes, front, held_out)
    marks = [*_draw_members(axes, front), *(_draw_held_out(axes, front) if held_out else [])]
    marks += [*_draw_parents(axes, front), *_draw_baselines(axes, front), *_draw_evaluated(axes, front)]
    if marks:  # the worst models would be in the lower right: seldom any are in view
        axes.legend(handles=marks, loc="lower right", framealpha=0.9, edgecolor="none", fontsize=9, labelcolor=_INK)
    _label(figure, axes, front)
    return figure


def _frame(axes: Axes, front: Front, title: str) -> None:
    n = len(front.members)
    facts = f"{len(front.evaluated)} models evaluated, {n} on the front, hypervolume {front.hypervolume:.3f}"
    axes.set_title(f"{title}\n", loc="left", fontsize=13, fontweight="bold", color=_INK)
    axes.text(0.0, 1.02, facts, transform=axes.transAxes, fontsize=9.5, color="#5b6470")
    axes.set_xlabel("mean output tokens  (fewer is better)", color=_INK)
    axes.set_ylabel("accuracy, %  (more is better)", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_PALE)
    axes.tick_params(colors=_INK, color=_PALE)
    axes.grid(color="#e6e9ed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(8))


def _limits(axes: Axes, front: Front, held_out: bool) -> None:
    """Everything feasible is in view, and every parent; an infeasible model may lie outside."""
    shown = [row for row in front.evaluated if row.search.feasible] + [*front.parents, *front.baselines]
    spots = [_points(shown), *([_points(front.members, Split.HELD_OUT)] if held_out else [])]
    if not shown:
        return
    x = np.concatenate([p.tokens for p in spots])
    low = np.concatenate([p.accuracy - p.accuracy_stderr for p in spots])
    high = np.concatenate([p.accuracy + p.accuracy_stderr for p in spots])
    pad_x, pad_y = 0.07 * max(np.ptp(x), 1.0), 0.07 * max(high.max() - low.min(), 1.0)
    axes.set_xlim(max(0.0, x.min() - pad_x), x.max() + pad_x)
    axes.set_ylim(max(-1.0, low.min() - pad_y), min(101.5, high.max() + 1.4 * pad_y))


def _draw_members(axes: Axes, front: Front) -> list[Any]:
    """The front as the staircase of what can be had, with standard errors on both axes."""
    points = _points(front.members)
    if not len(points):
        return []
    right, bottom = axes.get_xlim()[1], axes.get_ylim()[0]
    x = np.concatenate([points.tokens[:1], points.tokens, [right]])
    y = np.concatenate([[bottom], points.accuracy, points.accuracy[-1:]])
    axes.fill_between(x, y, bottom, step="post", color=_FRONT, alpha=0.05, linewidth=0, zorder=1)
    axes.plot(x, y, drawstyle="steps-post", color=_FRONT, linewidth=1.4, zorder=3)
    mark = axes.errorbar(
        points.tokens, points.accuracy, xerr=points.tokens_stderr, yerr=points.accuracy_stderr, fmt="o", color=_FRONT,
        markersize=5.5, markeredgecolor="white", markeredgewidth=0.7, elinewidth=0.9, ecolor=f"{_FRONT}80", zorder=3.2,
        label="front ± standard error",
    )  # fmt: skip
    return [mark]


def _draw_held_out(axes: Axes, front: Front) -> list[Any]:
    """An arrow from each member to where it lies on held-out problems."""
    rows = [row for row in front.members if row.held_out is not None and row.held_out.summary]
    here, there = _points(rows), _points(rows, Split.HELD_OUT)
    arrow = {"arrowstyle": "-|>,head_width=0.14,head_length=0.28", "color": _HELD_OUT, "linewidth": 0.8}
    for x, y, to_x, to_y in zip(here.tokens, here.accuracy, there.tokens, there.accuracy, strict=True):
        axes.annotate("", (to_x, to_y), (x, y), arrowprops={**arrow, "shrinkA": 0, "shrinkB": 2.5}, zorder=3.1)
    if not rows:
        return []
    return axes.plot(
        there.tokens, there.accuracy, "o", color=_HELD_OUT, markersize=4.5, markerfacecolor="white",
        markeredgewidth=1.1, zorder=3.3, label="the same models, held out",
    )  # fmt: skip


def _draw_parents(axes: Axes, front: Front) -> list[Any]:
    points = _points(front.parents)
    if not len(points):
        return []
    return axes.plot(
        points.tokens, points.accuracy, "*", color=_PARENT, markersize=15, markeredgecolor="white",
        markeredgewidth=0.9, zorder=3.4, label="parents",
    )  # fmt: skip


def _draw_baselines(axes: Axes, front: Front) -> list[Any]:
    """Plain merges as diamonds; those on the line between two parents joined, ends included."""
    points = _points(front.baselines)
    if not len(points):
        return []
    on_line = [row for row in front.baselines if row.ask.name.startswith("line-")]
    if on_line:
        if len(front.parents) == 2:
            on_line += [row for row in front.baselines if row.ask.name == "average"]
        on_line.sort(key=lambda row: _share(row, front.parents[0].ask.name))
        line = _points([front.parents[-1], *on_line, front.parents[0]])
        axes.plot(line.tokens, line.accuracy, color=_BASELINE, linewidth=1.2, alpha=0.8, zorder=2.2)
    return axes.plot(
        points.tokens, points.accuracy, "D", color=_BASELINE, markersize=5.5, markeredgecolor="white",
        markeredgewidth=0.7, zorder=3.05, label="plain merges",
    )  # fmt: skip


def _share(row: Row, parent: str) -> float:
    """Of a parent in a plain mixture."""
    assert row.ask.recipe is not None, "what is no proposal of an optimizer is recorded with its recipe"
    return row.ask.recipe.rules[0].coefficients[parent]


def _draw_evaluated(axes: Axes, front: Front) -> list[Any]:
    apart = {row.ask.id for row in (*front.members, *front.parents, *front.baselines)}
    others = [row for row in front.evaluated if row.ask.id not in apart]
    feasible = _points([row for row in others if row.search.feasible])
    rest = _points([row for row in others if not row.search.feasible])
    marks = []
    if len(feasible):
        style: dict[str, Any] = {"color": "#7f93ad", "alpha": 0.45, "linewidth": 0, "label": "dominated"}
        marks.append(axes.scatter(feasible.tokens, feasible.accuracy, s=16, zorder=2, **style))
    if len(rest):
        (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
        outside = int(((rest.tokens < x0) | (rest.tokens > x1) | (rest.accuracy < y0) | (rest.accuracy > y1)).sum())
        label = "infeasible" + (f" ({outside} not in view)" if outside else "")
        style = {"facecolor": "none", "edgecolor": _PALE, "alpha": 0.7, "linewidth": 0.8, "label": label}
        marks.append(axes.scatter(rest.tokens, rest.accuracy, s=16, zorder=1.9, **style))
    return marks


def _label(figure: Figure, axes: Axes, front: Front) -> None:
    """Name the parents, the average and the knee, each where it covers least."""
    named = [(row, row.ask.name, _PARENT) for row in front.parents]
    named += [(row, row.ask.name, _BASELINE) for row in front.baselines if row.ask.name == "average"]
    if front.members and front.scale is not None and all(front.pick("knee") is not row for row, _, _ in named):
        named.append((front.pick("knee"), f"knee: {front.pick('knee').ask.name}", _FRONT))
    if not named:
        return
    renderer = FigureCanvasAgg(figure).get_renderer()
    points = _points(front.evaluated)
    taken = axes.transData.transform(np.column_stack([points.tokens, points.accuracy]))
    legend = axes.get_legend()
    boxes = [legend.get_window_extent(renderer)] if legend else []
    for row, text, color in named:
        spot = _points([row])
        places = [_annotate(axes, spot, text, color, *place) for place in _PLACES]
        extents = [label.get_window_extent(renderer) for label in places]
        best = int(np.argmin([_cover(box, axes, taken, boxes) for box in extents]))  # of equals the first, nearest
        boxes.append(extents[best])
        for label in places[:best] + places[best + 1 :]:
            label.remove()


def _annotate(axes: Axes, spot: _Points, text: str, color: str, distance: int, dx: int, dy: int) -> Any:
    return axes.annotate(
        text, (spot.tokens[0], spot.accuracy[0]), (dx * distance, dy * distance), textcoords="offset points",
        ha=("right", "center", "left")[dx + 1], va=("top", "center", "bottom")[dy + 1], color=color,
        fontsize=9.5, fontweight="bold", zorder=5, path_effects=[withStroke(linewidth=2.5, foreground="white")],
    )  # fmt: skip


def _cover(box: Bbox, axes: Axes, taken: NDArray[Any], boxes: Sequence[Bbox]) -> float:
    """How bad a place for a label is: the points it hides, and far worse, other labels or an edge."""
    inside = (taken > (box.x0 - 4, box.y0 - 4)) & (taken < (box.x1 + 4, box.y1 + 4))
    clear = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
    return float(inside.all(axis=1).sum() + 20 * sum(box.overlaps(other) for other in boxes) + 20 * (not clear))


def _points(rows: Sequence[Row], split: Split = Split.SEARCH) -> _Points:
    """Scores of rows on a split; rows without any are left out."""
    entries = [row.search if split is Split.SEARCH else row.held_out for row in rows]
    scores = [entry.summary for entry in entries if entry is not None and entry.summary]

    def column(key: str, factor: float = 1.0) -> NDArray[np.float64]:
        return factor * np.array([score[key] for score in scores], float)

    return _Points(
        tokens=column("tokens_mean"),
        accuracy=column("accuracy", 100.0),
        tokens_stderr=column("tokens_mean_stderr"),
        accuracy_stderr=column("accuracy_stderr", 100.0),
    )
