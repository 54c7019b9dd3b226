"""Runs whose scores are made up: real ledgers, no model. What reads a ledger is tested on them."""

from contextlib import closing
from pathlib import Path

import numpy as np

from evo.assemble import build_space, first_candidates, open_sources
from evo.config import Config
from evo.hub import recipe_sources
from evo.ledger import Ledger
from evo.types import Candidate, Evaluation, Origin, Status
from fitness.types import Score, Split, Verdict

N_PROBLEMS = {Split.SEARCH: 200, Split.RESERVE: 10, Split.HELD_OUT: 1000}
POPULATION = 8


def config_of(parents: dict[str, Path], **changes) -> Config:
    """A config of a run over the given checkpoints; "base" is their ancestor."""
    sources = {name: path for name, path in parents.items() if name != "base"}
    values = {
        "parents": sources,
        "base": parents.get("base"),
        "task": {"kind": "arithmetic", **{str(split): n for split, n in N_PROBLEMS.items()}},
        "engine": {"max_tokens": 110},
        "optimizer": {"kind": "cma_es", "population": POPULATION},
        "baselines": {"average": True, "line_points": 6},
        "budget": {"candidates": 10_000},
        "seed": 3,
    }
    return Config.model_validate({**values, **changes})


class SyntheticRun:
    """Writes a ledger as evo.loop does, one generation at a time."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        sources = open_sources(config)
        digests = {name: f"{i:064x}" for i, name in enumerate(config.sources)}
        self.space = build_space(config, sources, digests)
        self._first = first_candidates(config, self.space, recipe_sources(config.sources, digests))
        self._rng = np.random.default_rng(config.seed)
        self._skill: dict[int, tuple[float, float]] = {}
        self._generation = 0
        folder.mkdir(parents=True, exist_ok=True)
        problems = {split: [f"{split}-{i}" for i in range(n)] for split, n in N_PROBLEMS.items()}
        meta = {"config": config.model_dump(mode="json"), "digests": digests, "versions": {"mergefront": "0"}}
        with closing(Ledger.create(folder, meta, problems)) as ledger:
            ledger.set_meta("budget", config.budget.model_dump())

    def first(self) -> None:
        """Parents (a wordy one, then a brief one) and the plain merges between them."""
        shares = np.linspace(0.0, 1.0, len(self._first) - 1)[1:-1]  # of the line's points
        skill = [(0.95, 66.0), (0.62, 23.0), (0.72, 36.0)]
        skill += [(0.60 + 0.36 * s**2, 23.0 + 43.0 / (1 + np.exp(-14 * (s - 0.55)))) for s in shares]
        with closing(Ledger.open(self.folder)) as ledger:
            for ask in ledger.append_asks(self._first):
                self._skill[ask.id] = skill[ask.id]
                self._evaluate(ledger, ask.id, Split.SEARCH)

    def generation(self, n_evaluated: int = POPULATION) -> None:
        """One batch of proposals, of which the first so many are evaluated; every thirteenth one fails."""
        self._generation += 1
        with closing(Ledger.open(self.folder)) as ledger:
            start, n_genes = len(ledger.asks()), len(self.space.genes)
            genomes = self._rng.random((POPULATION, n_genes), dtype=np.float32)
            batch = [
                Candidate(start + i, f"c{start + i}", Origin.SEARCH, self._generation, self.space.decode(g), g)
                for i, g in enumerate(genomes)
            ]
            ledger.append_asks(batch)
            for candidate in batch:
                self._skill[candidate.id] = self._draw()
            for candidate in batch[:n_evaluated]:
                self._evaluate(ledger, candidate.id, Split.SEARCH)

    def complete(self) -> None:
        """What was asked and has not been evaluated."""
        with closing(Ledger.open(self.folder)) as ledger:
            done = {entry.candidate_id for entry in ledger.entries(Split.SEARCH)}
            for ask in ledger.asks():
                if ask.id not in done:
                    self._evaluate(ledger, ask.id, Split.SEARCH)

    def held_out(self, ids: list[int]) -> None:
        """Held-out scores of some candidates."""
        with closing(Ledger.open(self.folder)) as ledger:
            for i in ids:
                self._evaluate(ledger, i, Split.HELD_OUT)

    def _draw(self) -> tuple[float, float]:
        """Accuracy and tokens of a proposal: closer to the ideal the later, a broken model now and then."""
        if self._rng.random() < 0.15:
            return self._rng.uniform(0.0, 0.5), self._rng.uniform(5.0, 100.0)
        tokens = self._rng.uniform(22.0, 60.0)
        reach = 0.96 - 0.36 * np.exp(-(tokens - 18.0) / (12.0 - 0.6 * self._generation))
        return float(np.clip(reach - self._rng.exponential(0.06), 0.0, 1.0)), tokens

    def _evaluate(self, ledger: Ledger, i: int, split: Split) -> None:
        if i % 13 == 12:
            failed = Evaluation(i, Status.FAILED, 0.5, detail={"reason": "MemoryError: no room"})
            ledger.append_evaluation(failed, split)
            return
        accuracy, tokens = self._skill[i]
        n = N_PROBLEMS[split]
        n_tokens = np.clip(self._rng.normal(tokens, tokens / 4, (n, 1)), 1, 110).astype(np.int32)
        wrong = np.where(self._rng.random((n, 1)) < 0.8, Verdict.WRONG, Verdict.UNPARSABLE)
        verdicts = np.where(self._rng.random((n, 1)) < accuracy, Verdict.CORRECT, wrong).astype(np.uint8)
        verdicts[n_tokens == 110] = Verdict.TRUNCATED
        score = Score(tuple(ledger.problem_ids(split)), verdicts, n_tokens, np.zeros_like(n_tokens))
        floor = 0.55 - score.accuracy if i > 1 else 0.0
        violations = {"accuracy": floor} if floor > 0 and split is Split.SEARCH else {}
        sample = {
            "question": "11+2*3-9",
            "answer": "30",
            "completion": "<think>11+2=13;13*3=39;39-9=30;</think>30",
            "n_tokens": int(n_tokens[0, 0]),
            "verdict": Verdict(int(verdicts[0, 0])).name.lower(),
        }
        detail = {"write_seconds": 0.02, "generate_seconds": 0.6, "n_written": 90, "n_skipped": 2, "samples": [sample]}
        losses = np.array([1 - score.accuracy, score.tokens_mean])
        ledger.append_evaluation(
            Evaluation(i, Status.DONE, 0.7, losses=losses, violations=violations, score=score, detail=detail), split
        )
