"""The picture of a front: it shows what the front holds, and draws whatever state a run is in."""

from contextlib import closing
from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from evo.front import front_of
from evo.history import History
from evo.ledger import Ledger
from evo.picture import draw_front, front_pixels, save_front
from tests.synthetic import SyntheticRun, config_of


@pytest.fixture(scope="module")
def front(moe_parents, tmp_path_factory):
    run = SyntheticRun(tmp_path_factory.mktemp("picture") / "run", config_of(moe_parents))
    run.first()
    for _ in range(6):
        run.generation()
    with closing(Ledger.open(run.folder)) as ledger:
        run.held_out([row.ask.id for row in History(ledger).front.unscored()])
        return History(ledger).front


def marks(figure):
    """Label in the legend -> its points (N, 2), read back from the artists."""
    found = {}
    for handle in figure.axes[0].get_legend_handles_labels()[0]:
        artist = handle[0] if isinstance(handle, tuple) else handle
        points = artist.get_offsets() if hasattr(artist, "get_offsets") else artist.get_xydata()
        found[handle.get_label()] = np.asarray(points)
    return found


def scores(rows, held_out=False):
    entries = [row.held_out if held_out else row.search for row in rows]
    return np.array([[e.summary["tokens_mean"], 100 * e.summary["accuracy"]] for e in entries])


def test_every_group_is_where_its_scores_are(front):
    found = marks(draw_front(front, title="t", held_out=True))
    assert np.allclose(found["front ± standard error"], scores(front.members))
    assert np.allclose(found["the same models, held out"], scores(front.members, held_out=True))
    assert np.allclose(found["parents"], scores(front.parents))
    assert np.allclose(found["plain merges"], scores(front.baselines))
    shown = {row.ask.id for row in (*front.members, *front.parents, *front.baselines)}
    others = [row for row in front.evaluated if row.ask.id not in shown]
    assert np.allclose(found["dominated"], scores([row for row in others if row.search.feasible]))
    infeasible = next(points for label, points in found.items() if label.startswith("infeasible"))
    assert np.allclose(infeasible, scores([row for row in others if not row.search.feasible]))


def test_the_line_goes_from_parent_to_parent_through_their_average(front):
    def share(row):
        return 0.5 if row.ask.name == "average" else float(row.ask.name.removeprefix("line-"))

    expected = scores([front.parents[1], *sorted(front.baselines, key=share), front.parents[0]])
    drawn = [line.get_xydata() for line in draw_front(front, title="t").axes[0].get_lines()]
    assert len(expected) == 9 and any(np.array_equal(line, expected) for line in drawn)


def test_all_that_is_feasible_is_in_view(front):
    axes = draw_front(front, title="t", held_out=True).axes[0]
    (x0, x1), (y0, y1) = axes.get_xlim(), axes.get_ylim()
    feasible = [row for row in front.evaluated if row.search.feasible]
    for points in (scores(feasible), scores(front.members, held_out=True)):
        assert (points > (x0, y0)).all() and (points < (x1, y1)).all()


def test_labels_cover_neither_each_other_nor_the_legend(front):
    figure = draw_front(front, title="t")
    axes, renderer = figure.axes[0], FigureCanvasAgg(figure).get_renderer()
    labels = [text for text in axes.texts if text.get_text() and text.get_fontweight() == "bold"]
    assert {"a", "b", "average"} <= {label.get_text() for label in labels}
    boxes = [item.get_window_extent(renderer) for item in (*labels, axes.get_legend())]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_the_title_says_how_much(front):
    texts = [text.get_text() for text in draw_front(front, title="chimera").axes[0].texts]
    expected = f"{len(front.evaluated)} models evaluated, {len(front.members)} on the front, hypervolume"
    assert any(text.startswith(expected) and f"{front.hypervolume:.3f}" in text for text in texts)


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_a_run_that_has_just_begun(front, n):
    pixels = front_pixels(front_of(front.evaluated[:n], ("error", "tokens")), title="t", held_out=True)
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and pixels.std() > 5


def test_files(front, tmp_path):
    save_front(front, tmp_path / "front.png", title="t", held_out=True)
    save_front(front, str(tmp_path / "front.svg"), title="t")
    assert imread(tmp_path / "front.png").shape[:2] == front_pixels(front, title="t").shape[:2]
    assert "<svg" in (tmp_path / "front.svg").read_text()
