"""A search as a user sees it: from a config or a run folder, to a front, to an exported checkpoint.

search = Search.from_yaml("search.yaml", out="runs/demo")
front = search.run()
search.export("knee", "runs/demo/export")

Search takes what a file would say, too: Search({"parents": {...}, "task": {...}, "budget": {...}}, out="runs/demo").
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from evo import ledger as ledger_file
from evo.assemble import (
    build_optimizer,
    build_space,
    build_task,
    notes_on,
    open_sources,
    search_problem,
    source_digests,
)
from evo.config import Budget, Config, ConfigError, changed_keys
from evo.config_file import budget_of, check, config_of, load_config
from evo.errors import ResumeError
from evo.front import Front
from evo.history import History
from evo.interrupts import interruptible
from evo.ledger import Ledger
from evo.loop import Loop, Watcher
from evo.run_folder import hold, stop_requested
from evo.stamps import Stamps
from evo.tracking import tracker
from fitness.splits import problems_of
from fitness.types import Problem, Split, Task

log = logging.getLogger("mergefront")


class Search:
    """A run folder and the config that it is, or will be, worked on with.

    Raises:
        ConfigError: for keys and values that are no config. One that was made as a Config is checked when it is run.
    """

    def __init__(self, config: Config | Mapping[str, Any], out: str | Path) -> None:
        self.config = config if isinstance(config, Config) else config_of(config)
        self.folder = Path(out)

    @classmethod
    def from_yaml(cls, path: str | Path, out: str | Path) -> Search:
        """Read and validate a config.

        Raises:
            ConfigError: naming the place in the file.
        """
        return cls(load_config(path), out)

    @classmethod
    def open(cls, folder: str | Path) -> Search:
        """An existing run, with the config it was started with.

        Raises:
            LedgerError: if there is none.
        """
        with closing(Ledger.open(Path(folder), read_only=True)) as ledger:
            return cls(Config.model_validate(ledger.meta("config")), folder)

    def front(self) -> Front:
        """The front as the ledger has it now."""
        with closing(Ledger.open(self.folder, read_only=True)) as ledger:
            return History(ledger).front

    @property
    def ended(self) -> str | None:
        """Why the search ended before its budget was spent, in words; None if it did not."""
        with closing(Ledger.open(self.folder, read_only=True)) as ledger:
            why: str | None = ledger.meta("ended")
            return why

    def run(self, watch: Watcher | None = None, budget: Budget | Mapping[str, Any] | None = None) -> Front:
        """Search until the budget is spent or somebody asks to stop; then score the front on held-out problems.

        Starts the run or goes on with it. Ctrl-C, SIGTERM, SIGHUP and `kill -9` lose at most the evaluation in flight.

        Args:
            watch: called after each evaluation.
            budget: replaces the config's, for this sitting and later ones: {"candidates": 400}, or a Budget.

        Raises:
            ConfigError: if the config or the budget cannot be used.
            TypeError: if nothing can call `watch`.
            BusyError: if another process works on this run.
            ResumeError: if the config, a parent or the problems have changed since the run started.
            CheckpointError: if the parents cannot be merged.
            SearchError: if a parent cannot be scored.
        """
        limits = None if budget is None else budget_of(budget)
        with self._sitting(watch, searches=True, budget=limits) as loop:
            loop.search()
            if not stop_requested(self.folder):
                loop.score_held_out()
        return self.front()

    def score_held_out(self, watch: Watcher | None = None, *, every: bool = False) -> Front:
        """Score on held-out problems what the front's table shows and has not been scored there yet.

        Args:
            watch: called after each evaluation.
            every: score every measured candidate, for a baseline that is judged as a whole (a line sweep).
        """
        with self._sitting(watch) as loop:
            loop.score_held_out(every=every)
        return self.front()

    def export(self, pick: str | int, out: str | Path, *, force: bool = False) -> Path:
        """Write a member of the front to disk as a checkpoint; see evo.export.export."""
        from evo.export import export

        export(self.folder, pick, Path(out), force=force)
        return Path(out)

    @contextmanager
    def _sitting(
        self, watch: Watcher | None, *, searches: bool = False, budget: Budget | None = None
    ) -> Iterator[Loop]:
        """Everything that can be checked is checked here, before a model is loaded."""
        if watch is not None and not callable(watch):
            raise TypeError(f"watch: expected a function that takes an evo.loop.Progress, got {watch!r:.100}")
        check(self.config)
        for name, path in self.config.sources.items():
            if self.folder.resolve() == path.resolve():
                raise ConfigError(f"{self.folder} is the checkpoint {name!r}: expected a folder of the run's own")
        with hold(self.folder), interruptible():
            sources = open_sources(self.config)
            stamps = Stamps.of_weights(sources.values())
            digests, task = source_digests(self.config), build_task(self.config)
            space = build_space(self.config, sources, digests)
            for note in notes_on(self.config, sources):
                log.warning(note)
            build_optimizer(self.config, search_problem(self.config, space))  # its options fail now or never
            with closing(self._open_ledger(task, digests)) as ledger:
                if searches:
                    self._settle_budget(ledger, budget)
                with tracker.following(self.folder, self.config.tracking):
                    yield Loop(self.config, self.folder, History(ledger), digests, stamps, space, task, watch)

    def _settle_budget(self, ledger: Ledger, budget: Budget | None) -> None:
        """Record the budget that was said last: as an argument, or by a change in the config."""
        of_config = self.config.budget.model_dump()
        if budget is not None or ledger.meta("budget_of_config") != of_config:
            ledger.set_meta("budget", budget.model_dump() if budget else of_config)
        ledger.set_meta("budget_of_config", of_config)

    def _open_ledger(self, task: Task, digests: dict[str, str]) -> Ledger:
        """Start the ledger, or open it and check that nothing it is bound to has changed."""
        asked = problems_of(task, self.config.task.kind)
        problems = {split: [problem.id for problem in found] for split, found in asked.items()}
        answers = {str(split): _digest_of_answers(found) for split, found in asked.items()}
        config, budget = self.config.model_dump(mode="json"), self.config.budget.model_dump()
        if ledger_file.exists(self.folder):
            ledger = Ledger.open(self.folder)
            if ledger.entries(Split.SEARCH):
                if changes := _changes(ledger, config, digests, problems, answers):
                    ledger.close()
                    raise ResumeError(
                        f"the run in {self.folder} cannot go on, because this has changed:\n  "
                        + "\n  ".join(changes)
                        + "\nUndo the change, or start a new run in another folder."
                    )
                ledger.set_meta("config", config)  # checkpoints may have moved
                return ledger
            ledger.close()
            ledger_file.discard(self.folder)  # nothing was measured, so there is nothing to protect: start anew
        bound_to = {"config": config, "digests": digests, "answers": answers, "versions": _versions()}
        return Ledger.create(self.folder, {**bound_to, "budget": budget, "budget_of_config": budget}, problems)


def _changes(
    ledger: Ledger,
    config: Mapping[str, Any],
    digests: Mapping[str, str],
    problems: Mapping[Split, list[str]],
    answers: Mapping[str, str],
) -> list[str]:
    """What of all that a run is bound to is not as its ledger has it, in words."""
    recorded = ledger.meta("answers") or answers  # a run of an earlier version has not recorded them
    return [
        *changed_keys(ledger.meta("config"), config),
        *(
            f"checkpoint {name!r}: its content has changed"
            for name, digest in digests.items()
            if digest != ledger.meta("digests").get(name)
        ),
        *(
            f"problems of split {str(split)!r}: not those that the run started with"
            for split, ids in problems.items()
            if ids != ledger.problem_ids(split)
        ),
        *(
            f"problems of split {split!r}: their answers have changed"
            for split, digest in answers.items()
            if digest != recorded[split]
        ),
    ]


def _digest_of_answers(problems: Sequence[Problem]) -> str:
    answers = json.dumps([problem.answer for problem in problems])
    return hashlib.blake2b(answers.encode(), digest_size=16).hexdigest()


def _versions() -> dict[str, str]:
    names = ("mergefront", "torch", "transformers", "numpy", "cma", "optuna")
    return {"python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in names}}
