"""The loop of a search: ask, record, evaluate, record, tell. Resumes by replaying what is recorded.

The order of every step is: the ledger first, then the optimizer, then whoever watches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from evo.assemble import build_optimizer, build_worker, first_candidates, search_problem
from evo.config import Config
from evo.constraints import violations
from evo.errors import ResumeError
from evo.history import History
from evo.hub import recipe_sources
from evo.ledger import EXACT, Ask, Entry
from evo.optimizers import Optimizer, Outcome, Start
from evo.proxy import Proxy
from evo.run_folder import stop_requested
from evo.stamps import Stamps
from evo.types import Candidate, Evaluation, Origin, Status
from evo.worker import Worker
from fitness.proxy.trial import Trial
from fitness.types import Split, Task
from search_spaces.genes import Genome, SearchSpace

log = logging.getLogger("mergefront")


ROUNDING = 1e-5
"""How far a replayed gene may be from the recorded one, which counts. Linear algebra rounds otherwise on another CPU,
or in more threads; what was measured of CMA-ES with 150 genes is 6e-8 after 60 generations."""
MOST_FAILURES = 100
"""In a row, after which a search gives up."""


class SearchError(RuntimeError):
    """A search cannot start, because a parent cannot be scored."""


@dataclass(frozen=True)
class Progress:
    """What a watcher is shown after each evaluation."""

    entry: Entry
    ask: Ask
    history: History


Watcher = Callable[[Progress], None]


class Loop:
    """One sitting of a run, with its ledger open and its lock held."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        history: History,
        digests: dict[str, str],
        stamps: Stamps,
        space: SearchSpace,
        task: Task,
        watch: Watcher | None,
    ) -> None:
        self._config, self._folder, self._history, self._digests = config, folder, history, digests
        self._stamps, self._space, self._task, self._watch = stamps, space, task, watch
        self._proxy = Proxy(config, history, task)
        self._worker: Worker | None = None
        self._has_told_errors = False
        self._n_failed = 0  # in a row
        self._n_first = 0  # parents and baselines, which no optimizer proposed

    def search(self) -> None:
        """Parents and baselines first, then generations until the budget is spent, then what still promises more."""
        self._score_first()
        self._prove()
        if not self._must_end():  # the optimizer's scale needs every parent
            self._propose()
        self._go_on(at_the_end=True)

    def _propose(self) -> None:
        optimizer, generation = self._replay()
        self._history.keep_ended(None)  # what held before may not hold with this budget
        while not self._must_end():
            genomes = optimizer.ask(optimizer.batch_size)
            if not genomes:
                limit = self._history.budget.candidates
                n = f"{self._history.spent['candidates']:.0f}" + (f" of {limit}" if limit else "")
                self._history.keep_ended(f"{self._config.optimizer.kind} has no more candidates: {n} evaluated")
                log.warning(self._history.ended)
                return
            generation += 1
            self._evaluate_batch(optimizer, self._record(genomes, generation))

    def score_held_out(self, *, every: bool = False) -> None:
        """Evaluate the front, the parents and the baselines (or every candidate) on the held-out split, once each."""
        for row in self._history.front.unscored(every=every):
            if stop_requested(self._folder):
                return
            self._record_evaluation(row.ask, self._evaluate(row.ask, Split.HELD_OUT), Split.HELD_OUT)

    def _score_first(self) -> None:
        """Parents, then baselines: the scale, the accuracy floor and every comparison rest on them."""
        if not self._history.asks:
            sources = recipe_sources(self._config.sources, self._digests)
            self._history.append_asks(first_candidates(self._config, self._space, sources))
            if self._config.baselines.swaps and not self._space.swaps():
                log.warning(
                    "baselines.swaps: this space has none: they are of linear mixtures of two kinds of parts or more, "
                    "whose coefficients may be 0 and 1, and of no knobs"
                )
        self._n_first = sum(ask.origin is not Origin.SEARCH for ask in self._history.asks)
        self._write_parents()
        for ask in self._history.asks[: self._n_first]:
            if ask.id in self._history.entries[Split.SEARCH]:
                continue
            if stop_requested(self._folder) or (ask.origin is Origin.BASELINE and self._must_end()):
                return
            evaluation = self._evaluate(ask, Split.SEARCH)
            if ask.origin is Origin.PARENT and evaluation.status is Status.FAILED:
                raise SearchError(f"parent {ask.name!r} cannot be scored: {evaluation.detail['reason']}")
            self._record_evaluation(ask, evaluation, Split.SEARCH)

    def _write_parents(self) -> None:
        """Find NaN and what else is wrong with a parent before the others are scored, which may take an hour.

        Raises:
            SearchError: if one cannot be written into the model.
        """
        known = self._history.entries[Split.SEARCH]
        parents = [ask for ask in self._history.asks if ask.origin is Origin.PARENT and ask.id not in known]
        if len(parents) < 2 or stop_requested(self._folder):
            return
        for ask in parents:
            if reason := self._ready().cannot_write(ask.recipe_in(lambda: self._space)):
                raise SearchError(f"parent {ask.name!r} cannot be scored: {reason}")
        if self._ready().batch_size is None:  # and is found by what is free beside all that a merge holds to
            merge = self._space.decode(np.full(len(self._space.genes), 0.5, np.float32))
            self._ready().cannot_write(merge, compressed=self._config.memory.deltas != "exact")

    def _replay(self) -> tuple[Optimizer, int]:
        """Bring a fresh optimizer to where the ledger ends; what was asked and not told is evaluated now."""
        problem = search_problem(self._config, self._space, self._history.front.scale, self._starts())
        optimizer = build_optimizer(self._config, problem)
        generations: dict[int, list[Ask]] = {}
        for ask in self._history.asks[self._n_first :]:
            generations.setdefault(ask.generation, []).append(ask)
        for batch in generations.values():
            _check_replay(optimizer.ask(len(batch)) or (), batch)
            told = [e for ask in batch if (e := self._history.entries[Split.SEARCH].get(ask.id))]
            for entry in sorted(told, key=lambda entry: entry.seq):
                self._tell(optimizer, entry)
            done = {entry.candidate_id for entry in told}
            self._evaluate_batch(optimizer, [ask for ask in batch if ask.id not in done])
        return optimizer, max(generations, default=0)

    def _evaluate_batch(self, optimizer: Optimizer, batch: Sequence[Ask]) -> None:
        for ask in batch:
            self._go_on()
            if self._must_end():
                return
            entry = self._record_evaluation(ask, self._evaluate(ask, Split.SEARCH), Split.SEARCH)
            self._tell(optimizer, entry)
            self._check_that_some_succeed(entry)
            self._prove()

    def _check_that_some_succeed(self, entry: Entry) -> None:
        """A budget of tokens would never be spent by candidates that all fail.

        Raises:
            SearchError: after too many failures in a row.
        """
        self._n_failed = self._n_failed + 1 if entry.status is Status.FAILED else 0
        if self._n_failed >= MOST_FAILURES:
            raise SearchError(
                f"the last {self._n_failed} candidates all failed, this one with {entry.detail['reason']}. They are "
                "recorded; a search of this space finds nothing else. Narrow its bounds, or choose another method."
            )

    def _prove(self) -> None:
        """Score again, with exact donors, what would be a member of the front by scores with compressed ones."""
        while self._history.front.unproven and not stop_requested(self._folder):
            ask = self._history.front.unproven[0].ask
            self._record_later(ask, self._evaluate(ask, Split.SEARCH, exact=True), EXACT)

    def _go_on(self, *, at_the_end: bool = False) -> None:
        """Ask parked candidates the problems that are left, the most promising first, while one promises enough.

        The optimizer is not told again: it has moved on, and pycma and Optuna take one value for a proposal.
        """
        while not stop_requested(self._folder) and (found := self._proxy.next_parked(at_the_end=at_the_end)):
            entry, trial = found
            ask, done = self._history.asks[entry.candidate_id], len(entry.detail["problems"])
            self._record_later(ask, self._evaluate(ask, Split.SEARCH, trial=trial), f"from problem {done + 1}")
            self._prove()

    def _tell(self, optimizer: Optimizer, entry: Entry) -> None:
        optimizer.tell(entry.candidate_id - self._n_first, _outcome(entry))

    def _starts(self) -> tuple[Start, ...]:
        """What is known before the optimizer's first proposal, where the space has a genome for it."""
        first, known = self._history.asks[: self._n_first], self._history.entries[Split.SEARCH]
        return tuple(Start(a.genome, _outcome(known[a.id])) for a in first if a.genome is not None and a.id in known)

    def _record(self, genomes: Sequence[Genome], generation: int) -> list[Ask]:
        start = len(self._history.asks)
        return self._history.append_asks(
            [
                Candidate(start + i, f"c{start + i}", Origin.SEARCH, generation, self._space.decode(genome), genome)
                for i, genome in enumerate(genomes)
            ]
        )

    def _record_evaluation(self, ask: Ask, evaluation: Evaluation, split: Split) -> Entry:
        if split is Split.SEARCH:
            evaluation = self._constrained(ask, evaluation)
        return self._shown(ask, self._history.append_evaluation(evaluation, split))

    def _record_later(self, ask: Ask, evaluation: Evaluation, how: str) -> Entry:
        return self._shown(ask, self._history.append_later(self._constrained(ask, evaluation), how))

    def _shown(self, ask: Ask, entry: Entry) -> Entry:
        if self._watch is not None:
            self._watch(Progress(entry, ask, self._history))
        return entry

    def _constrained(self, ask: Ask, evaluation: Evaluation) -> Evaluation:
        config, parents = self._config, self._history.front.parents
        found = violations(evaluation, ask.origin, config.objectives, config.constraints, parents)
        return replace(evaluation, violations=found)

    def _evaluate(self, ask: Ask, split: Split, *, exact: bool = False, trial: Trial | None = None) -> Evaluation:
        worker, recipe = self._ready(), ask.recipe_in(lambda: self._space)
        candidate = Candidate(ask.id, ask.name, ask.origin, ask.generation, recipe, ask.genome, ask.parents)
        searched = ask.origin is Origin.SEARCH and split is Split.SEARCH and not exact
        compressed = searched and self._config.memory.deltas != "exact"
        if searched and self._config.proxy.enabled and trial is None:
            trial = self._proxy.trial()
        evaluation = worker.evaluate(candidate, split, compressed=compressed, trial=trial)
        if changed := self._stamps.changed():
            raise ResumeError(
                f"{changed[0]} was written to, or replaced, while {ask.name!r} was evaluated, which is not recorded. "
                "What was recorded before is of the file as it was: restore it, or start a new run in another folder."
            )
        if evaluation.status is Status.FAILED:
            self._blame(ask, evaluation)
        self._history.keep_batch_size(worker.batch_size)
        self._history.keep_caveat(worker.caveat)
        if (errors := evaluation.detail.get("delta_errors")) and not self._has_told_errors:
            self._has_told_errors = True
            shown = ", ".join(f"{error:.2g} ({name})" for name, error in errors.items())
            log.warning(f"donors are held as {self._config.memory.deltas}; relative errors of differences: {shown}")
        return evaluation

    def _ready(self) -> Worker:
        """The worker, from when it is needed: loading a model takes long, and a finished run needs none."""
        if self._worker is None:
            self._worker = build_worker(self._config, self._task, self._history.batch_size)
        return self._worker

    def _blame(self, ask: Ask, evaluation: Evaluation) -> None:
        """A failure is the candidate's if a parent can still be written and asked; else it is nobody's to record.

        Raises:
            SearchError: if it cannot, as after an error of a GPU that outlives the call.
        """
        scored, parent = self._history.entries[Split.SEARCH], self._history.asks[0]
        if self._worker is None or parent.id not in scored:
            return
        if reason := self._worker.cannot_answer(parent.recipe_in(lambda: self._space)):
            raise SearchError(
                f"candidate {ask.name!r} failed ({evaluation.detail['reason']}), and now so does the parent "
                f"{parent.name!r}, which has been scored: {reason}. The failure is not the candidate's, and is not "
                "recorded: run the same command again."
            )

    def _must_end(self) -> bool:
        return stop_requested(self._folder) or self._history.exhausted


def _outcome(entry: Entry) -> Outcome:
    if entry.losses is None:
        return Outcome(None)
    return Outcome(np.array(entry.losses), sum(entry.violations.values()))


def _check_replay(proposed: Sequence[Genome], recorded: Sequence[Ask]) -> None:
    def same(mine: Genome, theirs: Genome | None) -> bool:
        return theirs is not None and mine.shape == theirs.shape and np.allclose(mine, theirs, rtol=0.0, atol=ROUNDING)

    if len(proposed) != len(recorded) or not all(same(p, a.genome) for p, a in zip(proposed, recorded, strict=True)):
        raise ResumeError(
            f"replaying generation {recorded[0].generation} gave other proposals than the ledger holds: another "
            "version of mergefront, pycma, Optuna or numpy is installed than when the run started (see `mergefront "
            "status`), or the optimizer draws numbers that `problem.seed` does not decide. Install those versions, or "
            "start a new run; `front` and `export` work either way."
        )
