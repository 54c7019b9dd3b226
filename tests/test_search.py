"""Whole searches on the built-in parents: real checkpoints, a real model, a real ledger."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evo import Search
from evo.assemble import build_space, first_candidates, open_sources, recipe_sources
from evo.checkpoint import Checkpoint, CheckpointError
from evo.config import Baselines, Budget, ConfigError
from evo.config_file import load_config
from evo.export import ExportError
from evo.front import PickError
from evo.ledger import Ledger
from evo.loop import ResumeError, SearchError
from evo.planning.machine import plan_search
from evo.run_folder import BusyError, hold, request_stop
from evo.scoring import score_checkpoint
from evo.types import Origin, Status
from fitness.tasks.arithmetic import Arithmetic, solve
from fitness.types import Split
from tests.conftest import CHIMERA

SIZES = {"search": 24, "reserve": 8, "held_out": 40}
MAX_TOKENS = 110


def write_config(folder: Path, *, parents: Path = CHIMERA, optimizer="{kind: cma_es, population: 5}", candidates=14):
    text = f"""\
parents: {{reasoner: {parents}/reasoner, concise: {parents}/concise}}
base: {parents}/base
task: {{kind: arithmetic, search: {SIZES["search"]}, reserve: {SIZES["reserve"]}, held_out: {SIZES["held_out"]}}}
engine: {{dtype: float32, device: cpu, batch_size: 64, max_tokens: {MAX_TOKENS}, threads: 1}}
optimizer: {optimizer}
budget: {{candidates: {candidates}}}
tracking: {{enabled: false}}
seed: 3
"""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "search.yaml").write_text(text)
    return folder / "search.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A search that ran to its end without interruption."""
    folder = tmp_path_factory.mktemp("finished")
    search = Search.from_yaml(write_config(folder), folder / "run")
    search.run()
    return search


def events(folder: Path):
    """All that a run recorded, but for times and seconds."""
    with closing(Ledger.open(folder, read_only=True)) as ledger:
        asks = [
            (a.id, a.generation, a.name, a.recipe, None if a.genome is None else a.genome.tobytes())
            for a in ledger.asks()
        ]
        entries = [
            (e.candidate_id, e.split, e.status, e.losses, e.violations, e.summary, e.detail.get("samples"))
            for split in Split
            for e in ledger.entries(split)
        ]
        scores = [ledger.score(e).verdicts.tobytes() for s in Split for e in ledger.entries(s) if e.losses]
    return asks, sorted(entries, key=lambda e: (e[1], e[0])), sorted(scores)


def generate_with_transformers(checkpoint: Path, questions):
    """Accuracy and tokens by model.generate, one question at a time: nothing of ours but the questions."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    n_tokens, correct = [], []
    for question in questions:
        message = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False)
        answer = out[0, ids.shape[1] :]
        n_tokens.append(len(answer))
        said = tokenizer.decode(answer, skip_special_tokens=True).replace(" ", "").rpartition("</think>")[2]
        correct.append(said == str(solve(question)))
    return np.array(correct), np.array(n_tokens)


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
        correct, n_tokens = generate_with_transformers(CHIMERA / parent, questions)
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

    def test_running_it_again_evaluates_nothing(self, finished):
        before = events(finished.folder)
        Search.from_yaml(finished.folder.parent / "search.yaml", finished.folder).run(
            watch=lambda event: pytest.fail("something was evaluated")
        )
        assert events(finished.folder) == before


class TestExport:
    def test_the_export_scores_as_the_candidate_did(self, finished, tmp_path):
        row = next(r for r in finished.front().members if r.ask.origin is Origin.SEARCH)
        out = finished.export(str(row.ask.id), tmp_path / "export")
        questions = [p.question for p in Arithmetic(**SIZES, seed=0).problems(Split.HELD_OUT)]
        correct, n_tokens = generate_with_transformers(out, questions)
        with closing(Ledger.open(finished.folder, read_only=True)) as ledger:
            score = ledger.score(row.held_out)
        assert score.correct[:, 0].tolist() == correct.tolist()
        assert score.n_tokens[:, 0].tolist() == n_tokens.tolist()

    def test_files_recipe_and_card(self, finished, tmp_path):
        from search_spaces.recipe import Recipe

        row = finished.front().pick("knee")
        out = finished.export("knee", tmp_path / "export")
        ours, parents = Checkpoint.open(out), CHIMERA / "reasoner"
        assert ours.weight_map == Checkpoint.open(parents).weight_map  # the layout that DeepSeek publishes
        for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
            assert (out / name).read_bytes() == (parents / name).read_bytes()
        sources = open_sources(finished.config)
        with closing(Ledger.open(finished.folder, read_only=True)) as ledger:
            recipe = row.ask.recipe_in(lambda: build_space(finished.config, sources, ledger.meta("digests")))
        assert Recipe.from_yaml((out / "recipe.yaml").read_text()) == recipe
        assert (out / "accounting.json").is_file() and not (out / "mergekit.yaml").exists()
        card = (out / "README.md").read_text()
        for part in (
            "reasoner",
            "concise",
            "held_out",
            "no mergekit.yaml: ",
            "tensors: ",
            f"{row.search.summary['accuracy']:.3f}",
        ):
            assert part in card

    def test_a_non_empty_folder_is_refused_and_left_alone(self, finished, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("years of work")
        with pytest.raises(ExportError, match="not empty"):
            finished.export("knee", tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        with pytest.raises(ExportError, match="holds no checkpoint"):
            finished.export("knee", tmp_path / "out", force=True)
        assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
        (tmp_path / "out" / "config.json").write_text("{}")
        finished.export("knee", tmp_path / "out", force=True)
        assert not (tmp_path / "out" / "thesis.txt").exists()
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("target", [CHIMERA / "reasoner", CHIMERA, CHIMERA.parent])
    def test_a_parent_is_never_overwritten(self, finished, target):
        with pytest.raises(ExportError, match="is or contains"):
            finished.export("knee", target, force=True)

    def test_nothing_is_left_of_an_export_that_fails(self, finished, tmp_path, monkeypatch):
        from evo.safetensors_writer import SafetensorsWriter

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(SafetensorsWriter, "write", full)
        with pytest.raises(ExportError, match=r"nothing of it is left.*No space left"):
            finished.export("knee", tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


class TestResume:
    @pytest.mark.parametrize("optimizer", ["{kind: cma_es, population: 5}", "{kind: nsga2, population: 5}"])
    def test_stopped_and_extended_equals_uninterrupted(self, optimizer, tmp_path):
        whole = Search.from_yaml(write_config(tmp_path / "a", optimizer=optimizer), tmp_path / "a/run")
        whole.run()
        path = write_config(tmp_path / "b", optimizer=optimizer, candidates=6)
        pieces = Search.from_yaml(path, tmp_path / "b/run")

        def stop_at_9(event):
            if event.history.spent["candidates"] == 9:
                request_stop(pieces.folder)

        pieces.run()
        pieces.run(stop_at_9, Budget(candidates=14))
        assert len(pieces.front().evaluated) == 9
        pieces.run(budget=Budget(candidates=14))
        assert events(pieces.folder)[0] == events(whole.folder)[0]
        assert _search_entries(pieces) == _search_entries(whole)
        assert [r.ask.id for r in pieces.front().members] == [r.ask.id for r in whole.front().members]

    def test_kill_9_at_random_moments(self, finished, tmp_path):
        """Killed again and again, the finished run is the uninterrupted one but for its times."""
        path, rng = write_config(tmp_path), random.Random(0)
        command = [sys.executable, "-m", "evo.cli", "run", str(path), "--out", str(tmp_path / "run")]
        n_killed, deadline = 0, time.monotonic() + 300
        while time.monotonic() < deadline:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for _ in range(rng.randint(1, 6)):  # so many evaluations, and then somewhere within the next
                if not process.stdout.readline():
                    break
            time.sleep(rng.uniform(0.0, 0.3))
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            n_killed += 1
            if process.returncode == 0 or n_killed == 4:
                break
        subprocess.run(command, check=True, capture_output=True)
        assert events(tmp_path / "run") == events(finished.folder)

    def test_ctrl_c_keeps_what_was_evaluated(self, tmp_path):
        search = Search.from_yaml(write_config(tmp_path), tmp_path / "run")

        def interrupt(event):
            if event.history.spent["candidates"] == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            search.run(interrupt)
        assert len(search.front().evaluated) == 5


class TestRefused:
    def test_another_config(self, finished, tmp_path):
        path = write_config(tmp_path, optimizer="{kind: cma_es, population: 6}")
        with pytest.raises(ResumeError, match=r"optimizer.population: 5 when the run started, 6 now"):
            Search.from_yaml(path, finished.folder).run()

    @pytest.fixture
    def own_parents(self, tmp_path):
        for name in ("reasoner", "concise", "base"):
            shutil.copytree(CHIMERA / name, tmp_path / "parents" / name)
        return tmp_path / "parents"

    def test_a_parent_that_changed(self, own_parents, tmp_path):
        path = write_config(tmp_path, parents=own_parents, candidates=3)
        search = Search.from_yaml(path, tmp_path / "run")
        search.run()
        shard = next((own_parents / "concise").glob("*.safetensors"))
        data = bytearray(shard.read_bytes())
        data[-5] ^= 1
        shard.write_bytes(data)
        with pytest.raises(ResumeError, match="checkpoint 'concise': its content has changed"):
            search.run(budget=Budget(candidates=5))
        with pytest.raises(ExportError, match="concise: the content"):
            search.export("max-accuracy", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_parents_that_do_not_fit(self, own_parents, tmp_path):
        config = json.loads((own_parents / "concise/config.json").read_text())
        (own_parents / "concise/config.json").write_text(json.dumps({**config, "vocab_size": 7}))
        search = Search.from_yaml(write_config(tmp_path, parents=own_parents), tmp_path / "run")
        with pytest.raises(CheckpointError, match="vocab_size"):
            search.run()
        assert not (tmp_path / "run" / "ledger.sqlite").exists()

    def test_nan_in_a_parent_is_found_before_another_is_scored(self, own_parents, tmp_path):
        shard = next((own_parents / "concise").glob("*.safetensors"))
        tensors = load_file(shard)
        next(iter(tensors.values())).view(-1)[3] = float("nan")
        save_file(tensors, shard, metadata={"format": "pt"})
        search, scored = Search.from_yaml(write_config(tmp_path, parents=own_parents), tmp_path / "run"), []
        with pytest.raises(SearchError, match=r"parent 'concise' cannot be scored: .*holds NaN"):
            search.run(scored.append)
        assert not scored

    def test_a_parent_that_cannot_be_scored(self, tmp_path):
        path = write_config(tmp_path)
        path.write_text(path.read_text().replace(f"max_tokens: {MAX_TOKENS}", "max_tokens: 100000"))
        with pytest.raises(SearchError, match=r"'reasoner' cannot be scored.*lower max_tokens"):
            Search.from_yaml(path, tmp_path / "run").run()

    def test_impossible_options_fail_before_anything_is_written(self, tmp_path):
        path = write_config(tmp_path, optimizer="{kind: cma_es, weights: [1.0, -2.0]}")
        with pytest.raises(ValueError, match="2 positive numbers"):
            Search.from_yaml(path, tmp_path / "run").run()
        assert not (tmp_path / "run" / "ledger.sqlite").exists()

    def test_a_run_that_never_measured_anything_takes_a_mended_config(self, tmp_path):
        path = write_config(tmp_path, candidates=2)
        path.write_text(path.read_text().replace("device: cpu", "device: cuda"))
        if not torch.cuda.is_available():
            with pytest.raises(ValueError, match="torch sees no GPU here"):
                Search.from_yaml(path, tmp_path / "run").run()
        write_config(tmp_path, candidates=2)
        assert len(Search.from_yaml(path, tmp_path / "run").run().evaluated) == 2

    def test_a_parent_is_no_run_folder(self, tmp_path):
        parents = shutil.copytree(CHIMERA, tmp_path / "parents")
        before = sorted(parents.rglob("*"))
        with pytest.raises(ConfigError, match="is the checkpoint 'concise': expected a folder of the run's own"):
            Search.from_yaml(write_config(tmp_path, parents=parents), parents / "concise").run()
        assert sorted(parents.rglob("*")) == before

    def test_two_processes_on_one_run(self, finished):
        with hold(finished.folder), pytest.raises(BusyError, match=f"process {os.getpid()} on"):
            finished.run()


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
    (figures,) = score_checkpoint(CHIMERA / "concise", [{"kind": "arithmetic", "held_out": 5}], engine)
    assert figures["n_samples"] == 1


def test_line_points_are_baselines(tmp_path):
    path = write_config(tmp_path, candidates=5)
    path.write_text(path.read_text() + "baselines: {average: false, line_points: 3}\n")
    front = Search.from_yaml(path, tmp_path / "run").run()
    assert [row.ask.name for row in front.baselines] == ["line-0.25", "line-0.5", "line-0.75"]


def test_as_many_line_points_as_there_may_be_have_names_of_their_own(chimera):
    sources = recipe_sources(chimera, {})
    for n in (1, 9, 99, 500, 1000):
        config = chimera.model_copy(update={"baselines": Baselines(line_points=n)})
        names = [c.name for c in first_candidates(config, build_space(config, open_sources(config)), sources)]
        assert len(set(names)) == len(names) == n + 3


def test_swaps_are_baselines_and_the_optimizer_starts_from_the_best(tmp_path):
    path = write_config(tmp_path, candidates=30, optimizer="{kind: cma_es, population: 4, sigma: 0.001}")
    path.write_text(path.read_text() + "baselines: {average: false, swaps: true}\n")
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


def test_an_automatic_batch_size_is_found_once_and_kept_in_the_run(tmp_path, monkeypatch):
    path = write_config(tmp_path, candidates=2)
    path.write_text(path.read_text().replace("batch_size: 64", "batch_size: auto"))
    search = Search.from_yaml(path, tmp_path / "run")
    monkeypatch.setattr("fitness.engines.transformers.rows_that_fit", lambda *_: 16)
    search.run()
    monkeypatch.setattr("fitness.engines.transformers.rows_that_fit", lambda *_: pytest.fail("looked for again"))
    search.run(budget=Budget(candidates=3))
    with closing(Ledger.open(search.folder, read_only=True)) as ledger:
        assert ledger.meta("batch_size") == 16


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


def _search_entries(search):
    return [e for e in events(search.folder)[1] if e[1] is Split.SEARCH]
