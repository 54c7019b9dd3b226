"""The only store of a run: what is appended is there, whole, whatever happens to the process."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from evo.ledger import FILE, FORMAT, Ledger, LedgerError, exists
from evo.types import Candidate, Evaluation, Origin, Status
from fitness.types import Score, Split
from search_spaces.recipe import Recipe, Rule, Source

RECIPE = Recipe({"a": Source("/a", "f00"), "b": Source("/b")}, "a", "b", (Rule("linear", {"b": 0.1}, blocks=(2,)),))
PROBLEMS = {Split.SEARCH: ["p1", "p2", "p3"], Split.RESERVE: ["r"], Split.HELD_OUT: ["h1", "h2", "h3"]}


def candidate(i, genome=None):
    return Candidate(i, f"c{i}", Origin.SEARCH, 1 + i // 4, RECIPE, genome, parents=(0,) if i else ())


def score(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 99, (3, 1), dtype=np.int32)
    return Score(tuple(PROBLEMS[Split.SEARCH]), rng.integers(0, 4, (3, 1), dtype=np.uint8), tokens, tokens // 2)


def evaluation(i, **changes):
    values = {"losses": np.array([0.25, 31.5]), "score": score(i), "detail": {"n_written": 4}}
    return Evaluation(i, Status.DONE, 1.5, **{**values, **changes})


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger.create(tmp_path, {"config": {"objectives": ["error", "tokens"]}}, PROBLEMS)
    yield ledger
    ledger.close()


def test_what_is_appended_is_read_back(ledger, tmp_path):
    genome = np.array([0.1, 0.7], np.float32)
    ledger.append_asks([candidate(0), candidate(1, genome)])
    ledger.append_evaluation(evaluation(1, violations={"truncated": 0.2}), Split.SEARCH)
    failed = Evaluation(0, Status.FAILED, 0.1, detail={"reason": "MemoryError: no"})
    ledger.append_evaluation(failed, Split.SEARCH)
    ledger.append_evaluation(evaluation(1), Split.HELD_OUT)
    ledger.close()
    again = Ledger.open(tmp_path)
    first, second = again.asks()
    assert first.recipe == RECIPE and first.genome is None
    assert second.recipe is None and np.array_equal(second.genome, genome)
    assert (second.name, second.origin, second.generation, second.parents) == ("c1", Origin.SEARCH, 1, (0,))
    done, lost = again.entries(Split.SEARCH)
    assert done.losses == (0.25, 31.5) and done.violations == {"truncated": 0.2} and not done.feasible
    assert lost.status is Status.FAILED and lost.losses is None and lost.detail == {"reason": "MemoryError: no"}
    assert done.summary == score(1).summary()
    read = again.score(done)
    for field in ("verdicts", "n_tokens", "n_think_tokens"):
        assert np.array_equal(getattr(read, field), getattr(score(1), field))
    assert again.entries(Split.HELD_OUT)[0].feasible
    assert [e.seq for e in (first, second, done, lost, again.entries(Split.HELD_OUT)[0])] == [1, 2, 3, 4, 5]
    assert again.last_seq() == 5
    again.close()


def test_genomes_are_kept_to_the_bit(ledger):
    genome = np.random.default_rng(0).random(15_000, dtype=np.float32)
    (ask,) = ledger.append_asks([candidate(0, genome)])
    assert ask.genome.tobytes() == genome.tobytes()


def test_what_a_baseline_is_needs_no_space_to_read(ledger):
    """It has a genome too, where the space can express it."""
    baseline = Candidate(0, "average", Origin.BASELINE, 0, RECIPE, np.full(2, 0.5, np.float32))
    (ask,) = ledger.append_asks([baseline])
    assert ask.recipe == RECIPE and ask.genome.tolist() == [0.5, 0.5]


def test_a_ledger_of_before_ids_is_known_by_when_it_was_made(ledger):
    assert ledger.id == ledger.meta("id")
    ledger.set_meta("id", None)
    assert ledger.id == str(ledger.meta("created"))


def test_nothing_is_changed_or_deleted(ledger, tmp_path):
    ledger.append_asks([candidate(0)])
    ledger.append_evaluation(evaluation(0), Split.SEARCH)
    db = sqlite3.connect(tmp_path / FILE)
    for statement in (
        "DELETE FROM asks",
        "UPDATE evaluations SET losses = '[0, 0]'",
        "DELETE FROM outcomes",
        "UPDATE problems SET ids = '[]'",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute(statement)
    db.close()


def test_a_candidate_is_told_once_a_split(ledger):
    ledger.append_asks([candidate(0)])
    ledger.append_evaluation(evaluation(0), Split.SEARCH)
    with pytest.raises(sqlite3.IntegrityError):
        ledger.append_evaluation(evaluation(0), Split.SEARCH)


def test_a_batch_of_asks_is_whole_or_absent(ledger):
    with pytest.raises(sqlite3.IntegrityError):
        ledger.append_asks([candidate(0), candidate(1), candidate(0)])
    assert ledger.asks() == []


def test_readers_need_no_lock_and_cannot_write(ledger, tmp_path):
    reader = Ledger.open(tmp_path, read_only=True)
    ledger.append_asks([candidate(0)])
    assert len(reader.asks()) == 1
    with pytest.raises(LedgerError, match="readonly"):
        reader.append_asks([candidate(1)])
    reader.close()


class TestRefused:
    def test_no_run(self, tmp_path):
        with pytest.raises(LedgerError, match="no run in"):
            Ledger.open(tmp_path)

    def test_something_else(self, tmp_path):
        (tmp_path / FILE).write_bytes(b"not a database, but long enough to look" * 40)
        with pytest.raises(LedgerError, match="not a ledger"):
            Ledger.open(tmp_path)

    def test_what_was_overwritten_behind_its_first_page(self, ledger, tmp_path):
        ledger.close()
        with (tmp_path / FILE).open("r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * ((tmp_path / FILE).stat().st_size - 4096))
        with pytest.raises(LedgerError, match=r"ledger\.sqlite is damaged"):
            Ledger.open(tmp_path)

    def test_an_older_format_is_read_as_it_is_and_renewed_before_it_is_appended_to(self, ledger, tmp_path):
        ledger.set_meta("format", 1)
        for read_only, found in ((True, 1), (False, FORMAT)):
            with closing(Ledger.open(tmp_path, read_only=read_only)) as again:
                assert again.meta("format") == found

    def test_a_newer_format(self, ledger, tmp_path):
        ledger.set_meta("format", 99)
        with pytest.raises(LedgerError, match="format 99"):
            Ledger.open(tmp_path)

    def test_killed_at_birth_is_as_good_as_none(self, tmp_path):
        (tmp_path / FILE).touch()
        assert not exists(tmp_path)


WRITER = """
import sys; from pathlib import Path
from tests.test_ledger import PROBLEMS, candidate, evaluation
from evo.ledger import Ledger, exists
from fitness.types import Split
import numpy as np
folder = Path(sys.argv[1])
ledger = Ledger.open(folder) if exists(folder) else Ledger.create(folder, {"config": {}}, PROBLEMS)
i = len(ledger.asks())
print("go", flush=True)
while True:
    ledger.append_asks([candidate(i, np.full(2000, i / 1e6, np.float32)), candidate(i + 1)])
    ledger.append_evaluation(evaluation(i), Split.SEARCH)
    i += 2
"""


def test_kill_9_at_any_moment_leaves_whole_events(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent
        )
        process.stdout.readline()
        time.sleep(rng.uniform(0.05, 0.4))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        ledger = Ledger.open(tmp_path)
        asks, entries = ledger.asks(), ledger.entries(Split.SEARCH)
        assert len(asks) % 2 == 0 and [a.id for a in asks] == list(range(len(asks)))
        assert {len(asks) // 2 - len(entries)} <= {0, 1, 2, 3, 4, 5}  # at most one in flight a kill
        for entry in entries:
            assert np.array_equal(ledger.score(entry).n_tokens, score(entry.candidate_id).n_tokens)
        ledger.close()
    assert len(entries) > 5
