"""Replays a run's ledger into MLflow, from where the last replay ended.

How far that was is kept in an offset file, but only to save work: a replay from the start changes nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evo.config import Config
from evo.front import Row
from evo.hub import recipe_sources
from evo.ledger import Ledger
from evo.tracking.generations import Record
from search_spaces.genes import SearchSpace
from search_spaces.recipe import Recipe

if TYPE_CHECKING:
    from evo.tracking.mlflow_store import MlflowStore

OFFSET_FILE = "tracker.json"


@dataclass(frozen=True)
class Target:
    """Where a run is tracked."""

    uri: str
    experiment: str

    @property
    def digest(self) -> str:
        """What the offset file calls it; a URI may hold a password."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Offset:
    """How far a run has been replayed into a target."""

    target: str
    experiment_id: str
    run_id: str
    n_generations: int = 0
    """Complete generations that have been logged."""
    seq: int = 0
    """Of the last event of the ledger that was taken into account."""

    @classmethod
    def load(cls, folder: Path) -> Offset | None:
        """The run's, or None if there is none that can be read."""
        try:
            return cls(**json.loads((folder / OFFSET_FILE).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    @property
    def page(self) -> str:
        """The run's page, to be appended to a server's address. MLflow 3 opens an experiment on pages for
        chat logs otherwise.
        """
        return f"/#/experiments/{self.experiment_id}/runs/{self.run_id}?workflowType=machine_learning"

    def save(self, folder: Path) -> None:
        """Whole or not at all."""
        beside = folder / f".{OFFSET_FILE}.new"
        beside.write_text(json.dumps(asdict(self)))
        beside.replace(folder / OFFSET_FILE)


@dataclass(frozen=True)
class Report:
    """Where a replay ended."""

    experiment_id: str
    run_id: str
    n_generations: int
    n_members: int

    def __str__(self) -> str:
        return f"MLflow is up to date with {self.n_generations} generations and {self.n_members} members of the front"


class Replay:
    """One run and one target; keeps the connection from attempt to attempt."""

    def __init__(self, folder: Path, target: Target) -> None:
        self._folder, self._target = folder, target
        self._store: MlflowStore | None = None
        self._recipe_of: Callable[[Row], Recipe] | None = None
        self._report: Report | None = None
        self._seq = -1

    def attempt(self, *, running: bool) -> Report:
        """Replay whatever is new.

        Args:
            running: whether the search is at work; if not, nothing more will come soon, and MLflow is told so.

        Raises:
            Exception: whatever MLflow raises. What came before it is not replayed again.
        """
        with closing(Ledger.open(self._folder, read_only=True)) as ledger:
            seq = ledger.last_seq()
            if running and self._report and seq == self._seq:
                return self._report
            record, meta = Record.read(ledger), {key: ledger.meta(key) for key in ("config", "created", "digests")}
            meta["id"] = ledger.id
        try:
            self._report = self._replay(record, meta, seq, running)
        except BaseException:
            self._store = None  # whatever it remembers may be wrong by now
            raise
        self._seq = seq
        return self._report

    def _replay(self, record: Record, meta: dict[str, Any], seq: int, running: bool) -> Report:
        from evo.tracking.mlflow_store import (
            MlflowStore,  # draws: a search that only follows should not load matplotlib
        )

        config = Config.model_validate(meta["config"])
        if self._store is None:
            uri, experiment = self._target.uri, self._target.experiment
            self._store = MlflowStore(self._folder, uri, experiment, config, meta["id"], meta["created"])
        store, offset = self._store, Offset.load(self._folder)
        place = (self._target.digest, store.experiment_id, store.run_id)
        if offset is None or (offset.target, offset.experiment_id, offset.run_id) != place:
            offset = Offset(*place)
        n = 0
        for n, generation in enumerate(record.generations(running=running), start=1):
            if generation.complete and n <= offset.n_generations:
                continue
            store.log_generation(generation)
            if generation.complete:
                offset = replace(offset, n_generations=n)
                offset.save(self._folder)
        self._recipe_of = self._recipe_of or _recipes(config, meta["digests"])
        store.log_members(record, self._recipe_of)
        store.log_state(record, "running" if running else "finished" if record.finished else "stopped")
        replace(offset, seq=seq).save(self._folder)
        return Report(store.experiment_id, store.run_id, n, len(record.front.members))


def _recipes(config: Config, digests: dict[str, str]) -> Callable[[Row], Recipe]:
    """Reads the headers of the checkpoints, once, and only when a genome has to be decoded."""

    @functools.cache
    def space() -> SearchSpace:
        from evo.assemble import build_space, open_sources

        return build_space(config, open_sources(config), digests)

    sources = recipe_sources(config.sources, digests)  # a recorded recipe names where they lay when it was made
    return lambda row: replace(row.ask.recipe_in(space), sources=sources)
