"""Tracking: what MLflow holds is what the ledger says, however often and after whatever failure it is told."""

import itertools
import json
import os
import shutil
import sys
import time
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path

import filelock
import numpy as np
import pytest
import yaml

from evo.assemble import build_space, open_sources
from evo.config import Tracking
from evo.history import History
from evo.ledger import Ledger, LedgerError
from evo.tracking import tracker
from evo.tracking.mlflow_store import CANDIDATE_TAG, IMAGE_KEY
from evo.tracking.overview import member_page
from evo.tracking.replay import OFFSET_FILE, Offset, Replay, Target
from evo.types import Status
from fitness.types import Split
from search_spaces.recipe import Recipe
from tests.synthetic import POPULATION, SyntheticRun, config_of

N_FIRST, N_GENERATIONS, N_LAST = 9, 4, 3  # parents and baselines; complete generations; of an incomplete one
NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """One store for all tests, in experiments of their own: to make one takes MLflow seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture(scope="module")
def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


@pytest.fixture(scope="module")
def run(moe_parents, tmp_path_factory):
    """A search that ended in the middle of a generation, its budget spent."""
    budget = {"candidates": N_FIRST + N_GENERATIONS * POPULATION + N_LAST}
    run = SyntheticRun(tmp_path_factory.mktemp("tracker") / "my run", config_of(moe_parents, budget=budget))
    run.first()
    for _ in range(N_GENERATIONS):
        run.generation()
    run.generation(N_LAST)
    run.held_out([row.ask.id for row in front_of(run.folder).unscored()])
    return run


@pytest.fixture(scope="module")
def whole(run, client, uri):
    """The run as it is logged without interruption, in the experiment "whole"."""
    Replay(run.folder, Target(uri, "whole")).attempt(running=False)
    return everything(client, "whole")


def front_of(folder):
    with closing(Ledger.open(folder, read_only=True)) as ledger:
        return History(ledger).front


def copy_of(run, folder):
    """The same ledger in another folder, never tracked."""
    folder.mkdir()
    shutil.copy(run.folder / "ledger.sqlite", folder)
    return folder


def runs_of(client, experiment):
    """The one run of an experiment, and candidate id -> child run."""
    experiment_id = client.get_experiment_by_name(experiment).experiment_id
    runs = client.search_runs([experiment_id], max_results=1000)
    (top,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    children = [run for run in runs if run is not top]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} <= {top.info.run_id}
    by_id = {int(run.data.tags[CANDIDATE_TAG]): run for run in children}
    assert len(by_id) == len(children)
    return top, by_id


def history(client, run, key):
    return [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, key)]


def images(client, run):
    """(step, time) of each logged picture; a picture is two files."""
    names = [f.path.rpartition("/")[2].split("+") for f in client.list_artifacts(run.info.run_id, "images")]
    assert {parts[0] for parts in names} <= {IMAGE_KEY}
    return sorted((int(parts[2]), int(parts[4])) for parts in names if parts[-1] == "compressed.webp")


def everything(client, experiment):
    """All that MLflow holds of a search, without its own ids and without where the search's folder lies."""
    top, children = runs_of(client, experiment)

    def plain(run):
        of_folder = ("mlflow.runName", "mlflow.parentRunId", "mlflow.note.content", "mergefront.folder")
        tags = {key: value for key, value in run.data.tags.items() if key not in of_folder}
        metrics = {key: history(client, run, key) for key in run.data.metrics}
        files = sorted(file.path for file in client.list_artifacts(run.info.run_id))
        return run.info.status, run.info.start_time, run.info.end_time, run.data.params, tags, metrics, files

    return plain(top), images(client, top), {i: plain(child) for i, child in children.items()}


def text_of(client, run, name):
    return Path(client.download_artifacts(run.info.run_id, name)).read_text()


@pytest.fixture(scope="module")
def logged(client, whole):
    return runs_of(client, "whole")


@pytest.fixture(scope="module")
def ledger(run):
    with closing(Ledger.open(run.folder, read_only=True)) as ledger:
        asks = ledger.asks()
        return [(asks[entry.candidate_id], entry) for entry in ledger.entries(Split.SEARCH)]


def batch_of(ledger, index):
    return [entry for ask, entry in ledger if ask.generation == index]


def test_steps_are_generations_the_last_one_cut_short(client, logged, ledger):
    points = history(client, logged[0], "front/hypervolume")
    times = [round(1000 * batch_of(ledger, g)[-1].time) for g in range(N_GENERATIONS + 2)]
    assert [(step, when) for step, when, _ in points] == list(enumerate(times))
    assert images(client, logged[0]) == list(enumerate(times))


def test_fronts_by_pairwise_comparison(client, logged, ledger):
    hypervolumes = history(client, logged[0], "front/hypervolume")
    sizes, best = history(client, logged[0], "front/size"), history(client, logged[0], "best/tokens")
    wordiest, goal = max(e.losses[1] for _, e in ledger[:2]), max(1 - e.losses[0] for _, e in ledger[:2]) - 0.02
    for g in range(N_GENERATIONS + 2):
        points = {e.losses for ask, e in ledger if ask.generation <= g and e.feasible}
        front = [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]
        assert sizes[g][2] == len(front)
        assert best[g][2] == min(tokens for error, tokens in front if 1 - error >= goal)
        assert hypervolumes[g][2] == pytest.approx(_area(front, 1.1 * wordiest))
        assert history(client, logged[0], "best/accuracy")[g][2] == max(1 - error for error, _ in front)
        error, tokens = min(front, key=lambda p: p[0] ** 2 + (p[1] / (1.1 * wordiest)) ** 2)
        assert history(client, logged[0], "knee/accuracy")[g][2] == 1 - error
        assert history(client, logged[0], "knee/tokens")[g][2] == tokens


def test_a_generation_alone(client, logged, ledger):
    for g in range(N_GENERATIONS + 2):
        batch = batch_of(ledger, g)
        measured, feasible = [e for e in batch if e.losses], [e for e in batch if e.feasible]
        expected = {
            "gen/feasible_share": len(feasible) / len(batch),
            "gen/failed": sum(e.status is Status.FAILED for e in batch),
            "gen/accuracy_mean": np.mean([1 - e.losses[0] for e in measured]),
            "gen/accuracy_max": max(1 - e.losses[0] for e in feasible),
            "gen/tokens_mean": np.mean([e.losses[1] for e in measured]),
            "gen/tokens_min": min(e.losses[1] for e in feasible),
            "time/candidates_per_hour": 3600 * len(batch) / sum(e.seconds for e in batch),
            "time/generate_seconds": 0.6,
            "time/write_seconds": 0.02,
        }
        for key, value in expected.items():
            assert history(client, logged[0], key)[g][2] == pytest.approx(value), key


def test_the_budget(client, logged, ledger):
    seen = [e for _, e in ledger]
    assert [v for _, _, v in history(client, logged[0], "budget/candidates")][-1] == len(seen)
    tokens = sum(e.summary["n_generated"] for e in seen if e.summary)
    assert history(client, logged[0], "budget/tokens")[-1][2] == tokens
    hours = sum(e.seconds for e in seen) / 3600
    assert history(client, logged[0], "budget/hours")[-1][2] == pytest.approx(hours)


def test_the_run(client, run, logged):
    top, _ = logged
    assert (top.info.run_name, top.info.status) == (run.folder.name, "FINISHED")
    assert 8 <= len(top.data.params) <= 20 and top.data.params["optimizer"] == "cma_es"
    assert not any(key.startswith("proxy/") for key in top.data.metrics)  # there was none
    config = yaml.safe_load(text_of(client, top, "config.yaml"))
    assert config["optimizer"] == {"kind": "cma_es", "population": POPULATION} and "tracking" not in config


def test_children_are_the_members_of_the_front(run, logged):
    members = {row.ask.id: row for row in front_of(run.folder).members}
    assert logged[1].keys() == members.keys() and len(members) > 3
    for i, child in logged[1].items():
        search, held_out = members[i].search.summary, members[i].held_out.summary
        assert child.info.run_name == members[i].ask.name and child.info.status == "FINISHED"
        for key in ("accuracy", "accuracy_stderr", "tokens_mean", "truncated"):
            assert child.data.metrics[key] == search[key]
            assert child.data.metrics[f"held_out/{key}"] == held_out[key]
        assert len(child.data.params) <= 20


def test_a_childs_recipe_is_the_models(client, run, logged):
    with closing(Ledger.open(run.folder, read_only=True)) as ledger:
        space = build_space(run.config, open_sources(run.config), ledger.meta("digests"))
    for row in front_of(run.folder).members:
        recipe = Recipe.from_yaml(text_of(client, logged[1][row.ask.id], "recipe.yaml"))
        assert recipe == (space.decode(row.ask.genome) if row.ask.recipe is None else row.ask.recipe)
        assert logged[1][row.ask.id].data.params["recipe"] == recipe.digest[:16]


def test_samples_can_be_read(client, logged):
    text = text_of(client, next(iter(logged[1].values())), "samples.md")
    assert "11+2*3-9" in text and "<think>11+2=13;13*3=39;39-9=30;</think>30" in text and "tokens" in text


def test_the_overview(run, logged):
    note, front = logged[0].data.tags["mlflow.note.content"], front_of(run.folder)
    assert note.startswith("**Finished** in generation 5") and len(note) < 8000
    assert f"hypervolume {front.hypervolume:.4f}" in note and "mergefront export" in note
    for row in (*front.members, *front.parents, *front.baselines):
        here, there = row.search.summary, row.held_out.summary
        assert f"| {row.ask.name} | {100 * here['accuracy']:.1f} ± {100 * here['accuracy_stderr']:.1f} |" in note
        assert f"{100 * there['accuracy']:.1f} ± {100 * there['accuracy_stderr']:.1f} |" in note


def test_commands_of_a_page_can_be_pasted(run):
    member = front_of(run.folder).members[0]
    assert "mergefront export '/my runs/first' --pick" in member_page(member, Path("/my runs/first"))


def _area(front, width):
    """Share of the box [0, width] x [0, 1] that a front of (error, tokens) dominates, by slabs of tokens."""
    area, best = 0.0, 1.0
    points = sorted(front, key=lambda p: p[1])
    for (error, tokens), right in zip(points, [*(p[1] for p in points[1:]), width], strict=True):
        best = min(best, error)
        area += max(0.0, min(right, width) - tokens) * (1.0 - best)
    return area / width


def test_from_the_start_again_changes_nothing(client, run, whole, uri):
    (run.folder / OFFSET_FILE).unlink()
    Replay(run.folder, Target(uri, "whole")).attempt(running=False)
    assert everything(client, "whole") == whole


def test_an_offset_names_no_password_and_one_that_cannot_be_read_is_none(tmp_path):
    target = Target("http://me:secret@server", "demo")
    offset = Offset(target.digest, "1", "a run", n_generations=3, seq=70)
    offset.save(tmp_path)
    assert Offset.load(tmp_path) == offset and "secret" not in (tmp_path / OFFSET_FILE).read_text()
    assert target.digest not in (Target(target.uri, "other").digest, Target("http://server", "demo").digest)
    for text in ("", "{}", "[1]", '{"target": '):
        (tmp_path / OFFSET_FILE).write_text(text)
        assert Offset.load(tmp_path) is None


def test_told_as_it_happened_is_as_told_at_the_end(client, moe_parents, tmp_path, uri, monkeypatch):
    """Members come and go meanwhile; those that went have no run in the end."""
    monkeypatch.setattr(
        "evo.tracking.mlflow_store.front_pixels", lambda *_, **__: np.zeros((9, 9, 3), np.uint8)
    )  # faster
    grown = SyntheticRun(tmp_path / "grown", config_of(moe_parents))
    replay, seen = Replay(grown.folder, Target(uri, "grown")), set()
    grown.first()
    for n_evaluated in (POPULATION, POPULATION, 5):
        grown.generation(n_evaluated)
        replay.attempt(running=True)
        top, children = runs_of(client, "grown")
        assert top.info.status == "RUNNING"
        assert children.keys() == {row.ask.id for row in front_of(grown.folder).members}
        seen |= children.keys()
    assert seen - children.keys()
    replay.attempt(running=False)
    Replay(copy_of(grown, tmp_path / "copy"), Target(uri, "at once")).attempt(running=False)
    told = everything(client, "grown")
    assert told == everything(client, "at once")
    assert told[0][0] == "KILLED"  # its budget is not spent
    assert [step for step, _, _ in history(client, top, "front/size")] == [0, 1, 2]  # 3 may be completed later


def test_a_search_stays_one_run_when_its_config_changes(client, moe_parents, tmp_path, uri, monkeypatch):
    """What may change between sittings: the budget, how it is computed, where the parents lie."""
    monkeypatch.setattr("evo.tracking.mlflow_store.front_pixels", lambda *_, **__: np.zeros((9, 9, 3), np.uint8))
    moved = {name: shutil.copytree(path, tmp_path / "moved" / name) for name, path in moe_parents.items()}
    run = SyntheticRun(tmp_path / "changed", config_of(moe_parents, budget={"candidates": N_FIRST + POPULATION}))
    run.first()
    run.generation()
    Replay(run.folder, Target(uri, "changed")).attempt(running=False)
    changes = {"engine": {"max_tokens": 110, "threads": 1}, "memory": {"residency": "disk"}}
    later = config_of(moved, budget={"candidates": N_FIRST + 2 * POPULATION}, **changes).model_dump(mode="json")
    with closing(Ledger.open(run.folder)) as ledger:
        ledger.set_meta("config", later)
        ledger.set_meta("budget", later["budget"])
    run.generation()
    Replay(run.folder, Target(uri, "changed")).attempt(running=False)
    Replay(copy_of(run, tmp_path / "copy"), Target(uri, "changed, at once")).attempt(running=False)
    assert everything(client, "changed") == everything(client, "changed, at once")
    top, _ = runs_of(client, "changed")
    assert [step for step, _, _ in history(client, top, "front/size")] == [0, 1, 2]


def test_what_was_cut_short_is_told_again_when_it_is_whole_and_another_store_is_told_all(
    client, moe_parents, tmp_path, uri, monkeypatch
):
    monkeypatch.setattr("evo.tracking.mlflow_store.front_pixels", lambda *_, **__: np.zeros((9, 9, 3), np.uint8))
    run = SyntheticRun(tmp_path / "cut", config_of(moe_parents, budget={"candidates": N_FIRST + N_LAST}))
    run.first()
    run.generation(N_LAST)
    Replay(run.folder, Target(uri, "cut")).attempt(running=False)
    with closing(Ledger.open(run.folder)) as ledger:
        ledger.set_meta("budget", {"candidates": N_FIRST + POPULATION})
    run.complete()
    for experiment in ("cut", "another"):
        Replay(run.folder, Target(uri, experiment)).attempt(running=False)
        points = history(client, runs_of(client, experiment)[0], "budget/candidates")
        assert points[0][::2] == (0, N_FIRST) and points[-1][::2] == (1, N_FIRST + POPULATION)


def test_a_run_that_somebody_deletes_meanwhile_is_made_anew(client, moe_parents, tmp_path, uri, monkeypatch):
    from mlflow.exceptions import MlflowException

    monkeypatch.setattr("evo.tracking.mlflow_store.front_pixels", lambda *_, **__: np.zeros((9, 9, 3), np.uint8))
    run = SyntheticRun(tmp_path / "deleted", config_of(moe_parents))
    run.first()
    replay = Replay(run.folder, Target(uri, "deleted"))
    replay.attempt(running=True)
    top, _ = runs_of(client, "deleted")
    client.delete_run(top.info.run_id)
    run.generation()
    with pytest.raises(MlflowException, match="must be in the 'active' state"):
        replay.attempt(running=True)
    replay.attempt(running=True)
    (again,) = client.search_runs([top.info.experiment_id], "attributes.run_name = 'deleted'")
    assert again.info.run_id != top.info.run_id
    assert [step for step, _, _ in history(client, again, "front/size")] == [0, 1]


def test_no_run_ends_before_it_starts_when_the_clock_is_put_back(client, moe_parents, tmp_path, uri, monkeypatch):
    run, now = SyntheticRun(tmp_path / "back", config_of(moe_parents)), time.time()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", itertools.count(now - 3600, -1).__next__)
        run.first()
    Replay(run.folder, Target(uri, "back")).attempt(running=False)
    top, children = runs_of(client, "back")
    assert children and all(one.info.start_time <= one.info.end_time for one in (top, *children.values()))


def test_nothing_new_asks_nothing_of_the_store(run, whole, uri, monkeypatch):
    replay = Replay(run.folder, Target(uri, "whole"))
    replay.attempt(running=True)
    monkeypatch.setattr(replay, "_replay", lambda *_: pytest.fail("replayed"))
    replay.attempt(running=True)


def test_a_server_that_is_away(run, client, whole, tmp_path, uri):
    """It costs the search a bounded wait at its end and nothing else, and what is missing can be made up."""
    folder = copy_of(run, tmp_path / "away")
    start = time.monotonic()
    with tracker.following(folder, Tracking(uri=NOWHERE)):
        entered = time.monotonic() - start
    assert entered < 1.0 and time.monotonic() - start < tracker.DRAIN_SECONDS - 5
    assert "`mergefront sync` finishes later" in (folder / tracker.LOG_FILE).read_text()
    assert tracker.is_behind(folder)
    Replay(folder, Target(uri, "away")).attempt(running=False)
    assert everything(client, "away") == whole


def test_kill_9_of_the_tracker(run, client, whole, tmp_path, uri):
    """In the middle of its work: `sync` makes it up, nothing is there twice."""
    folder = copy_of(run, tmp_path / "killed")
    process = tracker._start(folder, uri, "killed", "follow")
    _wait(lambda: (folder / OFFSET_FILE).exists())
    process.kill()
    process.communicate()
    assert Offset.load(folder).n_generations < N_GENERATIONS + 1 and tracker.is_behind(folder)
    report = tracker.sync(folder, uri, "killed")
    assert not tracker.is_behind(folder) and report.run_id in tracker.how_to_look(folder, uri)
    assert (report.n_generations, report.n_members) == (N_GENERATIONS + 2, len(front_of(folder).members))
    assert everything(client, "killed") == whole


def test_kill_9_of_the_search(run, tmp_path, monkeypatch):
    """Its tracker notices, makes a last attempt and ends."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder = copy_of(run, tmp_path / "orphan")
    search = get_context("fork").Process(target=_search_forever, args=(folder,))
    search.start()
    _wait(lambda: _is_locked(folder))
    search.kill()
    search.join()
    _wait(lambda: not _is_locked(folder))
    assert "`mergefront sync` finishes later" in (folder / tracker.LOG_FILE).read_text()


def _search_forever(folder):
    with tracker.following(folder, Tracking(uri=NOWHERE)):
        time.sleep(600)


def test_one_tracker_at_a_time(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evo.tracking.tracker", str(run.folder), "sync"])
    monkeypatch.setenv("MERGEFRONT_TRACKER", json.dumps({"uri": NOWHERE, "experiment": "other"}))
    monkeypatch.setattr(os, "nice", lambda n: n)
    with filelock.FileLock(run.folder / tracker.LOCK_FILE):
        tracker.main()
    assert "another process" in json.loads(capsys.readouterr().out)["error"]


def test_no_tracking_starts_nothing(tmp_path):
    with tracker.following(tmp_path, Tracking(enabled=False)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_cannot_be_written_is_named_and_stops_no_search(run, tmp_path):
    folder = copy_of(run, tmp_path / "closed")
    (folder / tracker.LOG_FILE).mkdir()
    with pytest.raises(tracker.TrackerError, match=r"talk to MLflow: .*directory: '.*tracker\.log'"):
        tracker.sync(folder, NOWHERE)
    with tracker.following(folder, Tracking(uri=NOWHERE)):
        pass


def test_no_run(tmp_path):
    with pytest.raises(LedgerError, match="no run in"):
        tracker.sync(tmp_path)


def _is_locked(folder):
    lock = filelock.FileLock(folder / tracker.LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    lock.release()
    return False


def _wait(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
