"""Whole searches: real checkpoints, a real model, a real ledger."""

from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest

from evo import Search
from evo.assemble import build_space, first_candidates, open_sources
from evo.config import Baselines, Budget
from evo.config_file import load_config
from evo.front import PickError
from evo.hub import recipe_sources
from evo.ledger import Ledger
from evo.planning.machine import plan_search
from evo.run_folder import request_stop
from evo.scoring import score_checkpoint
from evo.types import Origin, Status
from fitness.tasks.arithmetic import Arithmetic
from fitness.types import Split
from search_spaces.recipe import Source
from tests.conftest import CHIMERA, PARENTS
from tests.searching import MAX_TOKENS, SIZES, events, generate_with_transformers, write_config


class TestFinishedRun:
    def test_parents_and_average_come_first(self, finished):
        front = finished.front()
        assert [row.ask.name for row in front.evaluated[:3]] == ["reasoner", "concise", "average"]
        assert len(front.evaluated) == 14

    def test_the_budget_is_kept_to_the_candidate(self, finished):
        with closing(Ledger.open(finished.folder, read_only=True)) as ledger:
            assert len(ledger.entries(Split.SEARCH)) == 14

    @pytest.mark.parametrize("parent", ["reasoner", "concise"])
    def test_parents_score_as_plain_transformers_says(self, finished, parent):
        row = next(row for row in finished.front().parents if row.ask.name == parent)
        with closing(Ledger.open(finished.folder, read_only=True)) as ledger:
            score = ledger.score(row.search)
        questions = [p.question for p in Arithmetic(**SIZES, seed=0).problems(Split.SEARCH)]
        correct, n_tokens = generate_with_transformers(PARENTS / parent, questions)
        assert score.correct[:, 0].tolist() == correct.tolist()
        assert score.n_tokens[:, 0].tolist() == n_tokens.tolist()

    def test_the_front_by_pairwise_comparison(self, finished):
        front = finished.front()
        feasible = [row for row in front.evaluated if row.search.feasible]
        better = lambda a, b: all(x <= y for x, y in zip(a.losses, b.losses, strict=True)) and a.losses != b.losses  # noqa: E731
        expected = {r.losses for r in feasible if not any(better(q, r) for q in feasible)}
        assert {r.losses for r in front.members} == expected
        assert [r.search.summary["tokens_mean"] for r in front.members] == sorted(
            r.search.summary["tokens_mean"] for r in front.members
        )

    def test_infeasible_is_what_the_config_says(self, finished):
        front = finished.front()
        worst = min((row.search.summary for row in front.parents), key=lambda s: s["accuracy"])
        floor = worst["accuracy"] - 2 * worst["accuracy_stderr"]
        for row in front.evaluated:
            summary = row.search.summary
            expected = summary["truncated"] <= 0.1 and (
                row.ask.origin is Origin.PARENT or summary["accuracy"] >= floor - 1e-12
            )
            assert row.search.feasible == expected, row.ask.name

    def test_the_front_is_scored_on_held_out_problems(self, finished):
        front = finished.front()
        assert front.unscored() == []
        assert {row.held_out.summary["n_problems"] for row in front.members} == {SIZES["held_out"]}
        beside = {row.ask.id for row in (*front.members, *front.parents, *front.baselines)}
        with closing(Ledger.open(finished.folder, read_only=True)) as ledger:
            assert {entry.candidate_id for entry in ledger.entries(Split.HELD_OUT)} == beside
            ids = [set(ledger.problem_ids(split)) for split in Split]
        assert sum(map(len, ids)) == len(set.union(*ids)) == sum(SIZES.values())

    def test_picks(self, finished):
        front = finished.front()
        summaries = [row.search.summary for row in front.members]
        assert front.pick("max-accuracy").search.summary["accuracy"] == max(s["accuracy"] for s in summaries)
        limit = summaries[0]["tokens_mean"]
        assert front.pick(f"max-tokens={limit}") is front.members[0]
        assert front.pick(str(front.members[-1].ask.id)) is front.members[-1]
        assert front.pick(front.members[-1].ask.name) is front.members[-1]
        assert front.pick("knee") in front.members
        for bad in ("kneee", "9999", "max-tokens=1", "max-tokens=x", "max-tokens=nan"):
            with pytest.raises(PickError):
                front.pick(bad)

    def test_seconds_are_those_of_writing_and_of_generating(self, finished):
        for row in finished.front().evaluated:
            entry = row.search
            assert entry.seconds > entry.detail["write_seconds"] + entry.detail["generate_seconds"] > 0

    def test_running_it_again_evaluates_nothing_and_loads_no_model(self, finished, monkeypatch):
        before = events(finished.folder)
        monkeypatch.setattr("evo.loop.build_worker", lambda *_: pytest.fail("a model was loaded"))
        Search.from_yaml(finished.folder.parent / "search.yaml", finished.folder).run(
            watch=lambda event: pytest.fail("something was evaluated")
        )
        assert events(finished.folder) == before


def test_a_failed_candidate_is_data(tmp_path, monkeypatch):
    """Out of memory, in the middle of materializing one candidate."""
    from evo.materializer import Materializer

    write, calls = Materializer.write, []

    def sometimes(self, recipe):
        calls.append(1)
        if len(calls) == 7:  # each of two parents is written once before any is scored
            raise MemoryError("no room for one more")
        return write(self, recipe)

    monkeypatch.setattr(Materializer, "write", sometimes)
    search = Search.from_yaml(write_config(tmp_path), tmp_path / "run")
    front = search.run()
    with closing(Ledger.open(search.folder, read_only=True)) as ledger:
        failed = [e for e in ledger.entries(Split.SEARCH) if e.status is Status.FAILED]
        assert [(e.candidate_id, e.detail["reason"]) for e in failed] == [(4, "MemoryError: no room for one more")]
        assert len(ledger.entries(Split.SEARCH)) == 14
    assert 4 not in {row.ask.id for row in front.evaluated}


def test_budget_in_tokens(tmp_path):
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace("candidates: 14", "tokens: 6000"))
    search = Search.from_yaml(path, tmp_path / "run")
    search.run()
    with closing(Ledger.open(search.folder, read_only=True)) as ledger:
        generated = [e.summary["n_generated"] for e in ledger.entries(Split.SEARCH)]
    assert sum(generated) >= 6000 > sum(generated[:-1])


def test_an_empty_decoding_is_the_default(tmp_path, finished):
    path = write_config(tmp_path, candidates=2)
    path.write_text(path.read_text().replace("threads: 1", "decoding:"))
    found = Search.from_yaml(path, tmp_path / "run").run().evaluated
    assert [row.losses for row in found] == [row.losses for row in finished.front().evaluated[:2]]
    assert plan_search(load_config(path), out=tmp_path).load.answers == SIZES["search"]
    engine = {"dtype": "float32", "device": "cpu", "max_tokens": MAX_TOKENS, "decoding": None}
    (figures,) = score_checkpoint(PARENTS / "concise", [{"kind": "arithmetic", "held_out": 5}], engine)
    assert figures["n_samples"] == 1


def test_line_points_are_baselines(tmp_path):
    path = write_config(tmp_path, candidates=5)
    path.write_text(path.read_text() + "baselines: {average: false, line_points: 3}\n")
    front = Search.from_yaml(path, tmp_path / "run").run()
    assert [row.ask.name for row in front.baselines] == ["line-0.25", "line-0.5", "line-0.75"]


def test_the_middle_of_the_line_is_the_average_and_evaluated_once(chimera):
    def names(n_parents, n_points):
        parents = dict(list(chimera.sources.items())[:n_parents])
        config = chimera.model_copy(update={"parents": parents, "baselines": Baselines(line_points=n_points)})
        sources = {name: Source(name) for name in parents}
        space = SimpleNamespace(uniform=lambda shares: None)
        return [candidate.name for candidate in first_candidates(config, space, sources)][n_parents:]

    assert names(2, 3) == ["average", "line-0.25", "line-0.75"]
    assert names(2, 2) == ["average", "line-0.333", "line-0.667"]
    assert names(3, 1) == ["average", "line-0.5"]


def test_as_many_line_points_as_there_may_be_have_names_of_their_own(chimera):
    sources = recipe_sources(chimera.sources, {})
    for n in (1, 9, 99, 500, 1000):
        config = chimera.model_copy(update={"baselines": Baselines(line_points=n)})
        names = [c.name for c in first_candidates(config, build_space(config, open_sources(config)), sources)]
        assert len(set(names)) == len(names) == n + 3 - n % 2  # the middle is the average


def test_swaps_are_baselines_and_the_optimizer_starts_from_the_best(tmp_path):
    optimizer = "{kind: cma_es, population: 4, sigma: 0.001}"
    path = write_config(tmp_path, parents=CHIMERA, candidates=30, optimizer=optimizer)
    few = path.read_text().replace(f"search: {SIZES['search']}", "search: 8")
    path.write_text(few + "baselines: {average: false, swaps: true}\n")
    search = Search.from_yaml(path, tmp_path / "run")

    def stop(event):
        if event.ask.origin is Origin.SEARCH:
            request_stop(search.folder)

    front = search.run(stop)
    names = [row.ask.name for row in front.baselines]
    assert "only-routed_expert" in names and "but-attention" in names
    first, starts = front.evaluated[-1], front.evaluated[:-1]
    scaled = [sum(front.scale(row.losses)) / 2 * 0.05 + max(front.scale(row.losses)) / 2 for row in starts]
    best = starts[int(np.argmin(scaled))]  # equal weights, rho 0.05: the optimizer's defaults
    assert np.allclose(first.ask.genome, best.ask.genome, atol=0.01)


def test_an_automatic_batch_size_is_found_once_and_kept_in_the_run_with_the_engines_caveat(tmp_path, monkeypatch):
    path = write_config(tmp_path, candidates=2)
    path.write_text(path.read_text().replace("batch_size: 64", "batch_size: auto"))
    search = Search.from_yaml(path, tmp_path / "run")
    monkeypatch.setattr("fitness.engines.transformers.rows_that_fit", lambda *_: 16)
    monkeypatch.setattr("fitness.engines.transformers._caveat_of", lambda config: "text depends on the batch")
    search.run()
    monkeypatch.setattr("fitness.engines.transformers.rows_that_fit", lambda *_: pytest.fail("looked for again"))
    search.run(budget=Budget(candidates=3))
    with closing(Ledger.open(search.folder, read_only=True)) as ledger:
        assert (ledger.meta("batch_size"), ledger.meta("caveat")) == (16, "text depends on the batch")


def test_samples_are_drawn_alike_for_twins_and_scored_as_a_matrix(tmp_path):
    """A space of one gene whose ends are the parents: the same weights and seeds give the same outcome."""
    path = write_config(tmp_path, optimizer="{kind: line_sweep, points: 2}", candidates=6)
    drawn = "decoding: {samples: 3, greedy: false, temperature: 0.7}, batch_size"
    path.write_text(path.read_text().replace("batch_size", drawn) + "space: {kind: line}\n")
    search = Search.from_yaml(path, tmp_path / "run")
    front = search.run()
    with closing(Ledger.open(search.folder, read_only=True)) as ledger:
        scores = {row.ask.name: ledger.score(row.search) for row in front.evaluated}
    assert {score.verdicts.shape for score in scores.values()} == {(SIZES["search"], 3)}
    tokens = [score.n_tokens for score in scores.values()]
    assert any((t[:, 0] != t[:, 1]).any() for t in tokens)
    ends = [score for name, score in scores.items() if name not in ("reasoner", "concise", "average")]
    for end in (ends[0], ends[-1]):
        twins = [scores[p] for p in ("reasoner", "concise")]
        assert any(np.array_equal(end.n_tokens, p.n_tokens) and np.array_equal(end.verdicts, p.verdicts) for p in twins)
