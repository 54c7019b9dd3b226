"""A run over several sittings, and on machines where something goes wrong."""

import io
import json
import re
import shutil
import sqlite3
from contextlib import closing

import numpy as np
import pytest
from rich.console import Console

from evo import Search
from evo.config import Budget
from evo.errors import ResumeError
from evo.export import export
from evo.ledger import Ledger, LedgerError
from evo.loop import SearchError
from evo.materializer import Materializer
from evo.merge import METHODS, Method, one_hot
from evo.merge_file import merge
from evo.optimizers.random_search import RandomSearch
from evo.run_folder import request_stop
from evo.terminal import front_table, print_ending, print_front, print_status
from evo.tracking import tracker
from evo.types import Origin, Status
from fitness.engines.transformers import TransformersEngine
from fitness.types import Split
from tests.commands import invoke
from tests.conftest import PARENTS
from tests.encoding import files_of
from tests.searching import MAX_TOKENS, write_config


def refuse(donors, base, coefficients):
    raise ValueError("no, thanks")


MINE = Method(refuse, copy_of=one_hot)


def entries_of(search, split=Split.SEARCH):
    with closing(Ledger.open(search.folder, read_only=True)) as ledger:
        return ledger.entries(split)


def budget_of(search):
    with closing(Ledger.open(search.folder, read_only=True)) as ledger:
        return ledger.meta("budget")["candidates"]


def test_the_budget_that_was_said_last_holds(tmp_path):
    search = Search.from_yaml(write_config(tmp_path, candidates=3), tmp_path / "run")
    search.run()
    search.run(budget=Budget(candidates=4))
    for again in (search, Search.open(search.folder)):
        again.run()
        again.score_held_out()
        assert budget_of(search) == 4 and len(entries_of(search)) == 4
    changed = Search.from_yaml(write_config(tmp_path, candidates=5), tmp_path / "run")
    changed.run()
    assert budget_of(search) == 5 and len(entries_of(search)) == 5
    Search.open(search.folder).score_held_out()
    Search.from_yaml(write_config(tmp_path, candidates=7), search.folder).score_held_out()  # which no budget limits
    assert budget_of(search) == 5
    for limits in (Budget(candidates=6), None):
        changed.run(budget=limits)
        assert budget_of(search) == 6 and len(entries_of(search)) == 6


class TestProblems:
    @pytest.fixture
    def search(self, tmp_path):
        problems = [{"question": f"{i}+{j}", "answer": (i + j) % 100} for i in range(9) for j in range(9)]
        self.write(tmp_path, problems)
        path = write_config(tmp_path, candidates=3)
        text = path.read_text().splitlines()
        table = "task: {kind: table, path: problems.jsonl, search: 8, held_out: 8}"
        path.write_text("\n".join(table if line.startswith("task:") else line for line in text))
        search = Search.from_yaml(path, tmp_path / "run")
        search.run()
        self.write(tmp_path, [{**problem, "answer": 7} for problem in problems])
        return search

    def write(self, folder, problems):
        (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, problems)))

    def test_other_answers_to_the_same_questions(self, search):
        with pytest.raises(ResumeError, match=r"problems of split 'search': their answers have changed"):
            search.run(budget=Budget(candidates=5))

    def test_other_questions(self, search, tmp_path):
        self.write(tmp_path, [{"question": f"{i}-{j}", "answer": 7} for i in range(9) for j in range(9)])
        with pytest.raises(ResumeError, match=r"problems of split 'search': not those that the run started with"):
            search.run(budget=Budget(candidates=5))

    def test_a_run_of_before_answers_were_recorded_goes_on(self, search):
        with closing(sqlite3.connect(search.folder / "ledger.sqlite")) as db, db:
            db.execute("DELETE FROM meta WHERE key = 'answers'")
        search.run(budget=Budget(candidates=4))
        assert len(entries_of(search)) == 4


def test_parents_may_move(own_parents, tmp_path):
    Search.from_yaml(write_config(tmp_path, parents=own_parents, candidates=3), tmp_path / "run").run()
    with closing(Ledger.open(tmp_path / "run", read_only=True)) as ledger:
        id = ledger.id
    moved = own_parents.rename(tmp_path / "moved")
    search = Search.from_yaml(write_config(tmp_path, parents=moved, candidates=4), tmp_path / "run")
    search.run()
    assert len(entries_of(search)) == 4
    with closing(Ledger.open(search.folder, read_only=True)) as ledger:
        assert ledger.id == id
    assert (Search.open(search.folder).export("reasoner", tmp_path / "out") / "config.json").is_file()
    merge(tmp_path / "out" / "recipe.yaml", tmp_path / "rebuilt")  # of parents where they lie now
    assert files_of(tmp_path / "rebuilt").keys() == files_of(moved / "reasoner").keys()
    front = search.front()
    merges = [row.ask.name for row in front.members if row.ask not in [parent.ask for parent in front.parents]]
    note = f"reasoner is a parent, and no merge; merges on the front: {', '.join(merges) or 'none'}"
    assert export(search.folder, "reasoner", tmp_path / "again").notes == (note,)
    assert all(export(search.folder, name, tmp_path / name).notes == () for name in merges)


def test_parents_are_scored_whatever_the_budget_and_a_stop_is_heeded_on_held_out_problems_too(tmp_path):
    search = Search.from_yaml(write_config(tmp_path), tmp_path / "run")

    def stop(event):
        if event.entry.split is Split.HELD_OUT:
            request_stop(search.folder)

    front = search.run(stop, Budget(tokens=1))
    assert [row.ask.name for row in front.evaluated] == ["reasoner", "concise"]
    assert len(front.unscored()) == 1
    assert not search.run().unscored() and len(entries_of(search)) == 2


def test_an_optimizer_is_told_of_its_own_proposals_what_is_recorded(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(RandomSearch, "tell", lambda self, *what: told.append(what))
    path = write_config(tmp_path, optimizer="{kind: random, population: 3}", candidates=8)
    text = path.read_text().replace(f"max_tokens: {MAX_TOKENS}", "max_tokens: 70")  # too few for most answers
    path.write_text(text + "constraints: {max_truncated: 0, accuracy_floor_stderrs: 0}\n")
    search = Search.from_yaml(path, tmp_path / "run")
    search.run()
    first, entries = entries_of(search)[:3], entries_of(search)[3:]
    assert [entry.candidate_id for entry in first] == [0, 1, 2]
    assert [index for index, _ in told] == list(range(5))
    assert [tuple(outcome.losses) for _, outcome in told] == [entry.losses for entry in entries]
    assert [outcome.violation for _, outcome in told] == [sum(entry.violations.values()) for entry in entries]
    assert any(len(entry.violations) == 2 for entry in entries)


def test_settings_that_differ_are_told(own_parents, tmp_path, caplog):
    config = own_parents / "concise" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 250}))
    Search.from_yaml(write_config(tmp_path, parents=own_parents), tmp_path / "run").run(budget=Budget(tokens=1))
    assert any("max_position_embeddings: 256 in reasoner, 250 in concise" in said for said in caplog.messages)


def test_parents_that_are_written_to_meanwhile(own_parents, tmp_path):
    search = Search.from_yaml(write_config(tmp_path, parents=own_parents, candidates=6), tmp_path / "run")

    def spoil(event):
        if event.ask.id == 2:
            shard = next((own_parents / "concise").glob("*.safetensors"))
            shard.write_bytes(shard.read_bytes()[:-1] + b"x")

    with pytest.raises(ResumeError, match=r"concise.*written to, or replaced, while 'c3' was evaluated, which is not"):
        search.run(spoil)
    assert [entry.candidate_id for entry in entries_of(search)] == [0, 1, 2]


def test_a_table_of_long_names_fits_a_terminal(tmp_path):
    path = write_config(tmp_path, candidates=4)
    path.write_text(path.read_text() + "baselines: {average: false, swaps: true}\n")
    front = Search.from_yaml(path, tmp_path / "run").run()
    for held_out in (False, True):
        console = Console(width=80, file=io.StringIO())
        console.print(front_table(front, held_out=held_out))
        text = console.file.getvalue()
        assert "only-att" in text and "…" not in text and max(map(len, text.splitlines())) <= 80


class TestFailures:
    def test_of_everything_from_some_moment_on_are_not_the_candidates(self, tmp_path, monkeypatch):
        """As after an error of a GPU, which outlives the call."""
        write, n_writes = Materializer.write, []

        def broken(self, recipe):
            n_writes.append(1)
            if len(n_writes) > 6:  # two are of parents before any is scored
                raise RuntimeError("device-side assert triggered")
            return write(self, recipe)

        search = Search.from_yaml(write_config(tmp_path, candidates=7), tmp_path / "run")
        with monkeypatch.context() as patched:
            patched.setattr(Materializer, "write", broken)
            with pytest.raises(SearchError, match=r"(?s)'c4' failed.*so does the parent 'reasoner'.*assert"):
                search.run()
            assert [entry.candidate_id for entry in entries_of(search)] == [0, 1, 2, 3]
            with pytest.raises(SearchError):  # and held-out scores are not lost either
                search.score_held_out()
            assert entries_of(search, Split.HELD_OUT) == []
        search.run()
        assert len(entries_of(search)) == 7
        assert all(entry.status is Status.DONE for split in Split for entry in entries_of(search, split))

    def test_to_answer_are_not_the_candidates_either(self, tmp_path, monkeypatch):
        generate, broken = TransformersEngine.generate, []

        def sometimes(self, *arguments, **options):
            if broken:
                raise RuntimeError("device-side assert triggered")
            return generate(self, *arguments, **options)

        monkeypatch.setattr(TransformersEngine, "generate", sometimes)
        search = Search.from_yaml(write_config(tmp_path, candidates=5), tmp_path / "run")
        with pytest.raises(SearchError, match=r"(?s)'c3' failed.*so does the parent 'reasoner'.*assert"):
            search.run(lambda event: broken.append(event) if event.ask.id == 2 else None)
        assert [entry.candidate_id for entry in entries_of(search)] == [0, 1, 2]

    def test_of_all_candidates_in_a_row_end_a_search(self, tmp_path, monkeypatch):
        write, n_writes = Materializer.write, []

        def picky(self, recipe):
            if len(recipe["rules"]) > 1:  # the space's; parents and their average have one rule, or none
                n_writes.append(1)
                if len(n_writes) != 3:
                    raise ValueError("collapsed")
            return write(self, recipe)

        monkeypatch.setattr(Materializer, "write", picky)
        monkeypatch.setattr("evo.loop.MOST_FAILURES", 6)
        path = write_config(tmp_path)
        path.write_text(path.read_text().replace("candidates: 14", "tokens: 1_000_000"))
        search = Search.from_yaml(path, tmp_path / "run")
        with pytest.raises(SearchError, match=r"the last 6 candidates all failed, this one with ValueError: collapsed"):
            search.run()
        assert [entry.status for entry in entries_of(search)] == [
            *[Status.DONE] * 3, *[Status.FAILED] * 2, Status.DONE, *[Status.FAILED] * 6,
        ]  # fmt: skip

    def test_of_a_merge_method_name_the_tensor(self, tmp_path, monkeypatch):
        monkeypatch.setitem(METHODS, "mine", f"{__name__}:MINE")
        monkeypatch.setattr("evo.loop.MOST_FAILURES", 1)
        path = write_config(tmp_path)
        path.write_text(path.read_text() + "space: {kind: block, method: mine}\n")
        where = r"no, thanks \(\S+\.weight, merge method refuse\)"
        with pytest.raises(SearchError, match=rf"with ValueError: {where}\. They are recorded"):
            Search.from_yaml(path, tmp_path / "run").run()
        rule = "{method: mine, coefficients: {donor: 0.5}}"
        sources = f"{{donor: {{path: {PARENTS}/reasoner}}, base: {{path: {PARENTS}/concise}}}}"
        path.write_text(f"version: 1\nsources: {sources}\nbase: base\ninterface: base\nrules: [{rule}]\n")
        result = invoke("merge", path, "--out", tmp_path / "out")
        assert result.returncode == 1 and re.search(rf"^error: {where}$", result.stderr, re.MULTILINE)
        assert not (tmp_path / "out").exists()

    def test_to_write_are_told_and_lose_nothing(self, tmp_path):
        search = Search.from_yaml(write_config(tmp_path, candidates=3), tmp_path / "run")
        search.run()
        with closing(Ledger.open(search.folder)) as ledger:
            (n_pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
            ledger._db.execute(f"PRAGMA max_page_count = {n_pages}")  # sqlite's own word for a full disk
            with pytest.raises(LedgerError, match=r"cannot be written: .*full.*What it holds is safe"):
                ledger.set_meta("much", "x" * 100_000)
        assert len(entries_of(search)) == 3


def test_a_run_that_was_killed_in_its_first_instant_is_answered(tmp_path, monkeypatch, capsys):
    search = Search.from_yaml(write_config(tmp_path, candidates=3), tmp_path / "run")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Ledger, "set_meta", killed)  # the ledger has been made, and nothing comes after it
        search.run()
    print_status(search.folder)
    assert "budget: candidates 0 of 3" in capsys.readouterr().out
    assert not search.front().evaluated and not search.score_held_out().evaluated


def test_an_empty_front_says_why(tmp_path, capsys):
    path = write_config(tmp_path, candidates=3)
    path.write_text(path.read_text().replace(f"max_tokens: {MAX_TOKENS}", "max_tokens: 5"))
    front = Search.from_yaml(path, tmp_path / "run").run()
    assert not front.members
    print_front(front, ("error", "tokens"), held_out=False)
    assert "nothing is on the front: 3 of 3 models violate 'truncated'" in capsys.readouterr().out


@pytest.mark.parametrize("objectives", [["error"], ["tokens"]])
def test_one_objective(tmp_path, objectives, capsys):
    path = write_config(tmp_path, candidates=4)
    path.write_text(path.read_text() + f"objectives: {json.dumps(objectives)}\n")
    front = Search.from_yaml(path, tmp_path / "run").run()
    at = 0 if objectives == ["tokens"] else 1
    best = min((1.0 - r.search.summary["accuracy"], r.search.summary["tokens_mean"])[1 - at] for r in front.evaluated)
    assert {row.losses for row in front.members} == {(best,)}
    print_front(front, objectives, held_out=False)
    assert ("tokens)" if objectives == ["tokens"] else "error 1)") in capsys.readouterr().out


def test_a_copied_run_does_not_write_into_the_first(tmp_path):
    path = write_config(tmp_path, candidates=3)
    path.write_text(path.read_text().replace("tracking: {enabled: false}", ""))
    search = Search.from_yaml(path, tmp_path / "run")
    search.run()
    assert (search.folder / "mlartifacts").is_dir()
    before = {file: file.stat().st_mtime_ns for file in (search.folder / "mlartifacts").rglob("*")}
    shutil.copytree(search.folder, tmp_path / "copy")
    with pytest.raises(tracker.TrackerError, match=r"moved or copied.*delete mlflow.db, mlartifacts and tracker.json"):
        tracker.sync(tmp_path / "copy")
    assert before == {file: file.stat().st_mtime_ns for file in (search.folder / "mlartifacts").rglob("*")}


class TestAnOptimizerThatEndsEarly:
    def test_it_is_told_and_the_run_is_finished(self, tmp_path, caplog, capsys):
        path = write_config(tmp_path, candidates=30, optimizer="{kind: line_sweep, points: 2}")
        path.write_text(path.read_text() + "space: {kind: line}\n")
        search = Search.from_yaml(path, tmp_path / "run")
        search.run(budget=Budget(candidates=4))
        assert search.ended is None
        for n in (30, 30, 40):  # going on changes nothing but what is said
            front = search.run(budget=Budget(candidates=n))
            said = f"line_sweep has no more candidates: 5 of {n} evaluated"
            assert search.ended == said and len(entries_of(search)) == 5
            assert caplog.messages.count(said) == 1
            caplog.clear()
        print_ending(front, search)
        print_status(search.folder)
        out = capsys.readouterr().out
        assert f"ended     {said}; a larger budget changes nothing" in out and "go on" not in out
        assert f"{search.folder}: finished, " in out and f"note: {said}" in out

    @pytest.mark.parametrize("nothing", [None, []])
    def test_a_later_sitting_may_have_more(self, tmp_path, monkeypatch, nothing):
        search = Search.from_yaml(write_config(tmp_path, optimizer="{kind: random, population: 2}"), tmp_path / "run")
        ask = RandomSearch.ask
        monkeypatch.setattr(RandomSearch, "ask", lambda self, n: nothing)
        search.run(budget=Budget(tokens=10**6))
        assert search.ended == "random has no more candidates: 3 evaluated"
        monkeypatch.setattr(RandomSearch, "ask", ask)
        search.run(budget=Budget(candidates=5))
        assert search.ended is None and len(entries_of(search)) == 5


def test_an_optimizer_that_rounds_otherwise_goes_on(tmp_path, monkeypatch):
    """As linear algebra does on another CPU, or in more threads. What was recorded is what is evaluated."""
    search = Search.from_yaml(write_config(tmp_path, optimizer="{kind: random, population: 4}"), tmp_path / "run")
    search.run(budget=Budget(candidates=5))  # two of four

    def genomes():
        return [row.ask.genome for row in search.front().evaluated if row.ask.origin is Origin.SEARCH]

    ask, before = RandomSearch.ask, genomes()
    monkeypatch.setattr(RandomSearch, "ask", lambda self, n: [np.clip(g + 1e-7, 0, 1) for g in ask(self, n)])
    search.run(budget=Budget(candidates=6))
    assert np.array_equal(genomes()[:2], before) and len(genomes()) == 3
    with closing(Ledger.open(search.folder, read_only=True)) as ledger:
        assert np.array_equal([a.genome for a in ledger.asks()][-4:-2], before)


def test_an_optimizer_that_draws_of_its_own_cannot_go_on_and_is_told_why(tmp_path, monkeypatch):
    search = Search.from_yaml(write_config(tmp_path, optimizer="{kind: random, population: 2}"), tmp_path / "run")
    search.run(budget=Budget(candidates=4))
    ask, rng = RandomSearch.ask, np.random.default_rng(0)
    drawn = lambda self, n: [g * rng.random(dtype=np.float32) for g in ask(self, n)]  # noqa: E731
    for another in (drawn, lambda self, n: None, lambda self, n: ask(self, n)[1:]):
        monkeypatch.setattr(RandomSearch, "ask", another)
        with pytest.raises(ResumeError, match=r"or the optimizer draws numbers that `problem.seed` does not decide"):
            search.run(budget=Budget(candidates=6))
