"""NSGA-II (Deb et al. 2002) by Optuna's sampler, in memory; the ledger is what is kept.

Constraints enter by Deb's constrained domination: feasible before infeasible, less violated before more.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Le

from evo.optimizers import Outcome, SearchProblem
from evo.optimizers.batched import Batched
from search_spaces.genes import Genome

MOST_CLONES = 50
"""Children in a row that are known already, after which one is taken: the options may allow no others."""


class Nsga2(Batched):
    """One generation is one population. The first holds the starts, which are not evaluated again, and random genomes.

    Args:
        population: genomes a generation.
        mutation: probability that a gene is redrawn; default 1 / G.
        crossover: probability that a child has two parents.
        eta: distribution index of simulated binary crossover; children are nearer to their parents
            for larger values.
    """

    def __init__(
        self,
        problem: SearchProblem,
        *,
        population: Annotated[int, Ge(2)] = 24,
        mutation: Annotated[float, Ge(0), Le(1)] | None = None,
        crossover: Annotated[float, Ge(0), Le(1)] = 0.9,
        eta: Annotated[float, Gt(0)] = 2.0,
    ) -> None:
        import optuna

        super().__init__(population)
        self._population = population
        self._asked: deque[tuple[Any, ...]] = deque()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.NSGAIISampler(
                population_size=population,
                mutation_prob=mutation,
                crossover=optuna.samplers.nsgaii.SBXCrossover(eta=eta),
                crossover_prob=crossover,
                seed=problem.seed,
            )
        n_objectives = len(problem.scale.reference)
        self._study = optuna.create_study(directions=["minimize"] * n_objectives, sampler=sampler)
        self._names = [f"{i:05d}" for i in range(problem.n_genes)]
        known = [start for start in problem.starts if start.outcome.losses is not None]
        for start in known:
            self._study.enqueue_trial(dict(zip(self._names, map(float, start.genome), strict=True)))
        drawn = [self._draw() for _ in known]
        trials = [trial for trial, _ in drawn]
        self._known = {genome.tobytes() for _, genome in drawn}
        for trial in self._study.trials:  # asked for it, Optuna counts one whose genes are all given to a generation
            sampler.get_trial_generation(self._study, trial)
        for trial, start in zip(trials, known, strict=True):
            self._tell(trial, start.outcome)
        if len(known) < population:
            self.batch_size -= len(known)

    def ask_batch(self) -> list[Genome]:
        """See Batched."""
        trials, genomes = zip(*(self._propose() for _ in range(self.batch_size)), strict=True)
        self._asked.append(trials)
        self.batch_size = self._population
        return list(genomes)

    def tell_batch(self, outcomes: Sequence[Outcome]) -> None:
        """See Batched."""
        for trial, outcome in zip(self._asked.popleft(), outcomes, strict=True):
            self._tell(trial, outcome)

    def _propose(self) -> tuple[Any, Genome]:
        """A genome that is not known yet: one child in twenty is a clone, whose score would tell nothing."""
        import optuna

        for _ in range(MOST_CLONES):
            trial, genome = self._draw()
            if genome.tobytes() not in self._known:
                break
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)  # which no generation counts
        else:
            trial, genome = self._draw()
        self._known.add(genome.tobytes())
        return trial, genome

    def _draw(self) -> tuple[Any, Genome]:
        trial = self._study.ask()
        return trial, np.array([trial.suggest_float(name, 0.0, 1.0) for name in self._names], np.float32)

    def _tell(self, trial: Any, outcome: Outcome) -> None:
        import optuna

        trial.set_constraint("violation", outcome.violation)
        if outcome.losses is None:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(trial, [float(loss) for loss in outcome.losses])
