"""The only store of a run: every ask and every evaluation, in order, on disk before anything else sees it.

One sqlite file. sqlite brings what a log of our own would have to prove: a commit is atomic and durable at
any `kill -9`, a torn write is rolled back at the next open, readers (status, tracker) need no lock.
Triggers refuse to change or delete a row. Nothing is pickled: arrays are raw little-endian rows.

Tables: `meta` (format, id, config, digests of what the run must not change under), `problems`, `asks`, `evaluations`,
`outcomes` (of single problems).
"""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from evo.types import Candidate, Evaluation, Origin, Status
from fitness.types import Score, Split
from search_spaces.genes import Genome, SearchSpace
from search_spaces.recipe import Recipe

FORMAT = 3
"""1 is the same without partial evaluations, 2 without partial ones that go on."""
FILE = "ledger.sqlite"
EXACT = "exact donors"
"""How a candidate is evaluated again that was scored with compressed donors."""
_AGAIN = f"{Split.SEARCH}, "
"""Begins what stands for the search split in the rows that evaluate a candidate again."""

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE asks (
    seq INTEGER NOT NULL UNIQUE,   -- one count over asks and evaluations: the order of a replay
    id INTEGER PRIMARY KEY,        -- of the candidate, from 0
    time REAL NOT NULL,
    generation INTEGER NOT NULL,
    name TEXT NOT NULL UNIQUE,
    origin TEXT NOT NULL,
    parents TEXT NOT NULL,         -- JSON list of candidate ids
    recipe TEXT,                   -- JSON; NULL for proposals, whose genome says it all
    genome BLOB                    -- float32; NULL where the space cannot express the recipe
);
CREATE TABLE evaluations (
    seq INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    candidate INTEGER NOT NULL REFERENCES asks (id),
    split TEXT NOT NULL,
    status TEXT NOT NULL,
    seconds REAL NOT NULL,
    losses TEXT,                   -- JSON list
    violations TEXT NOT NULL,      -- JSON object
    summary TEXT,                  -- JSON object, Score.summary()
    detail TEXT NOT NULL,          -- JSON object
    UNIQUE (candidate, split)
);
CREATE TABLE outcomes (            -- per-problem arrays, apart so that tables are read without them
    seq INTEGER PRIMARY KEY REFERENCES evaluations (seq),
    verdicts BLOB NOT NULL,        -- uint8 (P, S)
    n_tokens BLOB NOT NULL,        -- int32 (P, S)
    n_think_tokens BLOB NOT NULL   -- int32 (P, S)
);
CREATE TABLE problems (split TEXT PRIMARY KEY, ids TEXT NOT NULL) WITHOUT ROWID;  -- JSON list
"""
_APPEND_ONLY = "".join(
    f"CREATE TRIGGER {table}_{verb} BEFORE {verb} ON {table} "
    f"BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;"
    for table in ("asks", "evaluations", "outcomes", "problems")
    for verb in ("UPDATE", "DELETE")
)


class LedgerError(ValueError):
    """A ledger cannot be used: missing, damaged, or of another format."""


@dataclass(frozen=True)
class Ask:
    """A recorded proposal."""

    seq: int
    id: int
    time: float
    generation: int
    name: str
    origin: Origin
    parents: tuple[int, ...]
    recipe: Recipe | None
    genome: Genome | None

    def recipe_in(self, space: Callable[[], SearchSpace]) -> Recipe:
        """What was proposed. Only a genome needs its space, which may have to read the checkpoints' headers."""
        if self.recipe is not None:
            return self.recipe
        assert self.genome is not None, "an ask has a recipe or a genome"
        return space().decode(self.genome)


@dataclass(frozen=True)
class Entry:
    """A recorded evaluation without its per-problem arrays."""

    seq: int
    time: float
    candidate_id: int
    split: Split
    status: Status
    seconds: float
    losses: tuple[float, ...] | None
    violations: dict[str, float]
    summary: dict[str, Any] | None
    detail: dict[str, Any]

    @property
    def exact(self) -> bool:
        """Whether the model that was scored is the one that an export writes: no donor was compressed."""
        return "delta_errors" not in self.detail

    @property
    def measured(self) -> bool:
        """Whether its losses are those of all problems of the split."""
        return self.status is Status.DONE

    @property
    def feasible(self) -> bool:
        """Measured, and within every constraint."""
        return self.measured and not self.violations

    @property
    def parked(self) -> bool:
        """Whether the proxy put it off: it promised too little to be asked the other problems now."""
        return self.status is Status.PARTIAL and "promise" in self.detail

    @property
    def collapsed(self) -> bool:
        """Whether the proxy's screen found it dead."""
        return self.status is Status.PARTIAL and self.detail["stopped_by"] is None and not self.parked

    @property
    def n_saved(self) -> int:
        """Tokens that the proxy spared it, by its estimate of them."""
        return int(self.detail.get("n_saved", 0))

    @property
    def n_tokens(self) -> int:
        """Tokens that it cost: generated, and read under teacher forcing; without those of an evaluation before."""
        generated = int((self.summary or {}).get("n_generated", 0)) - int(self.detail.get("n_before", 0))
        return generated + int(self.detail.get("n_forced", 0))


def holding(first: Iterable[Entry], later: Iterable[Entry]) -> list[Entry]:
    """The evaluation of each candidate that holds, its last, in the order in which candidates first occur."""
    return list({entry.candidate_id: entry for entry in (*first, *later)}.values())


class Ledger:
    """Open with `create` or `open`; close when done. One writer at a time (see evo.run_folder)."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    @classmethod
    def create(cls, folder: Path, meta: Mapping[str, Any], problems: Mapping[Split, Sequence[str]]) -> Ledger:
        """Start a ledger in a run folder.

        Args:
            folder: the run's, which must exist.
            meta: what the run is bound to, as JSON values.
            problems: split -> ids of its problems, in order.
        """
        ledger = cls(_connect(folder / FILE, mode="rwc"))
        with ledger._writing():
            ledger._db.executescript("BEGIN IMMEDIATE;" + _SCHEMA + _APPEND_ONLY)  # one transaction, all or nothing
            values = {"format": FORMAT, "id": uuid.uuid4().hex, "created": time.time(), **meta}
            ledger._db.executemany("INSERT INTO meta VALUES (?, ?)", [(k, json.dumps(v)) for k, v in values.items()])
            rows = [(str(split), json.dumps(list(ids))) for split, ids in problems.items()]
            ledger._db.executemany("INSERT INTO problems VALUES (?, ?)", rows)
        return ledger

    @classmethod
    def open(cls, folder: Path, *, read_only: bool = False) -> Ledger:
        """Open an existing ledger.

        Raises:
            LedgerError: if there is none, it is damaged, or it has a format that this version cannot read.
        """
        if not exists(folder):
            raise LedgerError(f"no run in {folder}: expected {FILE} there")
        ledger = cls(_connect(folder / FILE, mode="ro" if read_only else "rw"))
        try:
            version = ledger.meta("format")
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"{folder / FILE} is damaged: {error}") from error
        if version not in range(1, FORMAT + 1):
            raise LedgerError(f"{folder / FILE} has format {version}; this version reads formats 1 to {FORMAT}")
        if not read_only and version < FORMAT:
            ledger.set_meta("format", FORMAT)  # what is appended from now on, an older version cannot read
        return ledger

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._db.close()

    def meta(self, key: str) -> Any:
        """A value of the run, or None."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def set_meta(self, key: str, value: Any) -> None:
        """Set a value that may change (the budget, the state); all else only ever grows."""
        with self._writing():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    @property
    def id(self) -> str:
        """What its search is known by elsewhere: the same at every sitting, and wherever the folder lies."""
        return str(self.meta("id") or self.meta("created"))  # a ledger of an earlier version has no id

    def problem_ids(self, split: Split) -> list[str]:
        """Ids of a split's problems, in order."""
        row = self._db.execute("SELECT ids FROM problems WHERE split = ?", (str(split),)).fetchone()
        return [] if row is None else list(json.loads(row[0]))

    def append_asks(self, candidates: Sequence[Candidate]) -> list[Ask]:
        """Record one batch of proposals, whole or not at all, and return it as later readers will see it."""
        rows = [
            (
                c.id, time.time(), c.generation, c.name, str(c.origin), json.dumps(c.parents),
                json.dumps(c.recipe.to_dict()) if c.genome is None or c.origin is not Origin.SEARCH else None,
                None if c.genome is None else c.genome.astype("<f4").tobytes(),
            )
            for c in candidates
        ]  # fmt: skip
        with self._writing():
            first = self._next_seq()
            numbered = [(first + i, *row) for i, row in enumerate(rows)]
            self._db.executemany("INSERT INTO asks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", numbered)
        return list(self._asks("seq >= ?", (first,)))

    def append_evaluation(self, evaluation: Evaluation, split: Split, *, again: str | None = None) -> Entry:
        """Record what became of a candidate, and return it as later readers will see it.

        Args:
            evaluation: what to record.
            split: on which it was.
            again: how it is evaluated this time, if it was on the search split before; never twice the same way.
        """
        score = evaluation.score
        with self._writing():
            seq = self._next_seq()
            self._db.execute(
                "INSERT INTO evaluations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    seq, time.time(), evaluation.candidate_id, f"{_AGAIN}{again}" if again else str(split),
                    str(evaluation.status), evaluation.seconds,
                    None if evaluation.losses is None else json.dumps(evaluation.losses.tolist()),
                    json.dumps(evaluation.violations),
                    None if score is None else json.dumps(score.summary()),
                    json.dumps(evaluation.detail),
                ),
            )  # fmt: skip
            if score is not None:
                self._db.execute(
                    "INSERT INTO outcomes VALUES (?, ?, ?, ?)",
                    (
                        seq, score.verdicts.tobytes(), score.n_tokens.astype("<i4").tobytes(),
                        score.n_think_tokens.astype("<i4").tobytes(),
                    ),
                )  # fmt: skip
        return next(self._entries("seq = ?", (seq,)))

    def asks(self) -> list[Ask]:
        """All proposals, in order: candidate id -> its ask."""
        return list(self._asks("TRUE", ()))

    def entries(self, split: Split) -> list[Entry]:
        """All evaluations on a split, in the order in which they were recorded."""
        return list(self._entries("split = ?", (str(split),)))

    def later(self) -> list[Entry]:
        """All further evaluations on the search split, in the order in which they were recorded; the last one holds.

        With exact donors, of what was scored with compressed ones; on more problems, of what had been parked.
        """
        return list(self._entries("split LIKE ?", (f"{_AGAIN}%",)))

    def score(self, entry: Entry) -> Score:
        """The per-problem arrays of an evaluation; of a partial one, on the problems that were asked, in order."""
        row = self._db.execute(
            "SELECT verdicts, n_tokens, n_think_tokens FROM outcomes WHERE seq = ?", (entry.seq,)
        ).fetchone()
        ids = tuple(self.problem_ids(entry.split))
        ids = tuple(ids[i] for i in entry.detail["problems"]) if entry.status is Status.PARTIAL else ids
        shape = (len(ids), -1)
        return Score(
            problem_ids=ids,
            verdicts=np.frombuffer(row[0], np.uint8).reshape(shape),
            n_tokens=np.frombuffer(row[1], "<i4").astype(np.int32).reshape(shape),
            n_think_tokens=np.frombuffer(row[2], "<i4").astype(np.int32).reshape(shape),
            orderliness={name: np.array(values) for name, values in entry.detail.get("orderliness", {}).items()},
        )

    def last_seq(self) -> int:
        """Number of the latest event, 0 for none; grows with every append."""
        return self._next_seq() - 1

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A transaction.

        Raises:
            LedgerError: if it cannot be written, on a full disk, say.
        """
        try:
            with self._db:
                yield
        except sqlite3.OperationalError as error:
            raise LedgerError(
                f"the ledger cannot be written: {error}. What it holds is safe: see to the disk, and run it again"
            ) from error

    def _next_seq(self) -> int:
        query = "SELECT MAX(last) FROM (SELECT MAX(seq) AS last FROM asks UNION ALL SELECT MAX(seq) FROM evaluations)"
        (last,) = self._db.execute(query).fetchone()
        return int(last or 0) + 1

    def _asks(self, where: str, values: tuple[Any, ...]) -> Iterator[Ask]:
        # fetchall: a reader that decodes while it steps holds a lock that makes the search wait to commit
        for row in self._db.execute(f"SELECT * FROM asks WHERE {where} ORDER BY id", values).fetchall():
            seq, id, when, generation, name, origin, parents, recipe, genome = row
            yield Ask(
                seq=seq, id=id, time=when, generation=generation, name=name, origin=Origin(origin),
                parents=tuple(json.loads(parents)),
                recipe=None if recipe is None else Recipe.from_dict(json.loads(recipe)),
                genome=None if genome is None else np.frombuffer(genome, "<f4").astype(np.float32),
            )  # fmt: skip

    def _entries(self, where: str, values: tuple[Any, ...]) -> Iterator[Entry]:
        for row in self._db.execute(f"SELECT * FROM evaluations WHERE {where} ORDER BY seq", values).fetchall():
            seq, when, candidate, split, status, seconds, losses, violations, summary, detail = row
            yield Entry(
                seq=seq, time=when, candidate_id=candidate,
                split=Split.SEARCH if split.startswith(_AGAIN) else Split(split), status=Status(status),
                seconds=seconds, losses=None if losses is None else tuple(json.loads(losses)),
                violations=json.loads(violations), summary=None if summary is None else json.loads(summary),
                detail=json.loads(detail),
            )  # fmt: skip


def exists(folder: Path) -> bool:
    """Whether a run was started in a folder (a ledger killed in its first instant is as good as none).

    Raises:
        LedgerError: if there is a file of that name that is no ledger.
    """
    file = folder / FILE
    if not file.is_file() or file.stat().st_size == 0:
        return False
    try:  # "rw": the open may have to roll a torn write back
        with closing(_connect(file, mode="rw")) as db:
            return bool(db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0])
    except sqlite3.DatabaseError as error:
        raise LedgerError(f"{file} is not a ledger, or is damaged: {error}") from error


def discard(folder: Path) -> None:
    """Remove a ledger that holds no evaluation."""
    (folder / FILE).unlink()


def _connect(file: Path, mode: str) -> sqlite3.Connection:
    db = sqlite3.connect(f"file:{quote(str(file.absolute()))}?mode={mode}", uri=True, timeout=30.0)
    db.execute("PRAGMA synchronous = FULL")  # a commit returns when its bytes are on the disk
    return db
