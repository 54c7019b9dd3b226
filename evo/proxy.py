"""The proxy of a run: what fitness.proxy needs to know, read from the ledger.

References are the parents and baselines, which were asked every problem before the search began, so the order of
problems is the same in every sitting of a run.
"""

from __future__ import annotations

import pkgutil
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from evo.config import Config
from evo.constraints import accuracy_floor
from evo.errors import ResumeError
from evo.front import Row
from evo.history import History
from evo.ledger import Entry
from evo.types import Origin
from fitness.objectives import per_problem, worst
from fitness.proxy import ESTIMATORS
from fitness.proxy.order import choose
from fitness.proxy.promise import Promise
from fitness.proxy.racing import Race
from fitness.proxy.screen import Screen, Trace
from fitness.proxy.trial import Answered, Estimator, Trial
from fitness.types import Split, Task, Verdict

FIRST = 16
"""Problems before the first look, where none are chosen."""
MEANWHILE = 0.02
"""Share of the hypervolume's box that a parked candidate must promise to go on before the search is near its end. There
is a front to look at then, and little is spent on candidates that later ones beat (experiments/proxy)."""
CLOSING = 0.25
"""The last share of a budget of tokens or hours, in which parked candidates come before new ones."""


class Proxy:
    """Hands out trials. Parents and baselines have been scored by then.

    Args:
        config: of the run.
        history: of the run; the front is read from it whenever a trial is asked for.
        task: of the run.
    """

    def __init__(self, config: Config, history: History, task: Task) -> None:
        self._config, self._history, self._task = config, history, task
        self._losses: dict[int, NDArray[np.float64]] = {}
        self._estimates: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}  # by number of the entry

    def trial(self) -> Trial:
        """The rules for a new candidate, which is parked after the first look."""
        return self._trial(np.inf if self._config.proxy.gain else 0.0, None)

    def next_parked(self, *, at_the_end: bool = False) -> tuple[Entry, Trial] | None:
        """The parked candidate that promises most and the rules for it, if it promises enough to be asked more.

        Args:
            at_the_end: whether the search proposes nothing more.
        """
        history, gain = self._history, self._config.proxy.gain
        used = history.share_spent("tokens", "hours")
        if not self._config.proxy.enabled or not gain or used >= 1.0:
            return None
        enough = gain if at_the_end or used >= 1.0 - CLOSING else max(gain, MEANWHILE)
        latest = map(history.latest, history.entries[Split.SEARCH])
        # what it promised when it was parked is the most that it can promise now: the front has only grown
        parked = [entry for entry in latest if entry.parked and entry.detail["promise"] >= enough]
        if not parked:
            return None
        mean, deviation = (np.array(column) for column in zip(*map(self._estimate, parked), strict=True))
        promised = self._promise.of(mean, deviation)
        if promised.max() < enough:
            return None
        entry = parked[int(promised.argmax())]
        answered = Answered(history.score(entry), np.array(entry.detail["problems"]))
        if not np.array_equal(answered.problems, self._race.order.problems[: len(answered.problems)]):
            raise ResumeError(  # it would be asked some problems twice and others never
                f"candidate {history.asks[entry.candidate_id].name!r} was asked its problems in another order than the "
                "references suggest now: another version of mergefront or numpy is installed than when the run started "
                "(see `mergefront status`). Install those versions, or start a new run; `front` and `export` work "
                "either way."
            )
        return entry, self._trial(enough, answered)

    def _trial(self, enough: float, before: Answered | None) -> Trial:
        members = self._history.front.members
        return Trial(
            objectives=self._config.objectives,
            race=self._race,
            racing=self._config.proxy.race,
            screen=self._screen,
            estimator=self._estimator,
            ids=tuple(row.ask.id for row in members),
            members=np.array([self._losses_of(row) for row in members]),
            worst=worst(self._config.objectives, self._config.engine.max_tokens),
            first=self._config.proxy.chosen or FIRST,
            promise=self._promise,
            enough=enough,
            before=before,
        )

    @property
    def _promise(self) -> Promise:
        front, objectives = self._history.front, self._config.objectives
        assert front.scale is not None, "parents come before any candidate"
        limits = np.full(len(objectives), np.inf)
        if "error" in objectives:
            limits[objectives.index("error")] = 1.0 - accuracy_floor(self._config.constraints, front.parents)
        losses = np.array([row.losses for row in front.members]).reshape(-1, len(objectives))
        return Promise(losses, front.scale.reference, limits)

    def _estimate(self, entry: Entry) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of a parked candidate: losses over the split, and their standard errors."""
        if entry.seq not in self._estimates:
            seen = per_problem(self._history.score(entry), self._config.objectives)
            problems = np.array(entry.detail["problems"])
            estimator = self._estimator
            self._estimates[entry.seq] = estimator.estimate(problems, seen), estimator.deviation(problems, seen)
        return self._estimates[entry.seq]

    @cached_property
    def _references(self) -> list[Row]:
        """Parents first."""
        return [*self._history.front.parents, *self._history.front.baselines]

    @cached_property
    def _reference_losses(self) -> NDArray[np.float64]:
        return np.array([self._losses_of(row) for row in self._references])

    @cached_property
    def _race(self) -> Race:
        scale, floor = self._history.front.scale, self._reference_losses.min(axis=0)
        assert scale is not None, "parents come before any candidate"
        if "error" in self._config.objectives:
            floor[:, self._config.objectives.index("error")] = 0.0
        return Race(
            order=choose(self._reference_losses, self._config.proxy.chosen, self._config.seed),
            tolerance=self._config.proxy.tolerance * scale.reference,
            floor=floor,
            alpha=self._config.proxy.alpha,
        )

    @cached_property
    def _estimator(self) -> Estimator:
        build = pkgutil.resolve_name(ESTIMATORS[self._config.proxy.estimator])
        found: Estimator = build(self._reference_losses, len(self._config.parents), self._config.objectives)
        return found

    @cached_property
    def _screen(self) -> Screen:
        scores = [self._history.score(row.search) for row in self._references]
        ended = np.array([(score.verdicts != Verdict.TRUNCATED).all(axis=1) for score in scores])
        return Screen(self._config.proxy.screen, np.asarray(ended.any(axis=0)), self._traces())

    def _traces(self) -> tuple[Trace, ...]:
        """Correct answers of parents among the samples that the ledger keeps as text."""
        if not self._config.proxy.likelihood:
            return ()
        prompts = {problem.question: self._task.prompt(problem) for problem in self._task.problems(Split.SEARCH)}
        return tuple(
            Trace(row.ask.name, prompts[sample["question"]], sample["completion"])
            for row in self._references
            if row.ask.origin is Origin.PARENT
            for sample in row.search.detail["samples"]
            if sample["verdict"] == "correct"
        )

    def _losses_of(self, row: Row) -> NDArray[np.float64]:
        """Losses on all problems, (P, M)."""
        if row.ask.id not in self._losses:
            self._losses[row.ask.id] = per_problem(self._history.score(row.search), self._config.objectives)
        return self._losses[row.ask.id]
