"""What candidates once answered to every problem: read from the ledgers of finished searches, kept in one file."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from record import BLOCKS_FILE, RUNS

from evo.config import Config
from evo.ledger import Ledger
from evo.types import Origin
from fitness.objectives import per_problem
from fitness.types import Split

OBJECTIVES = ("error", "tokens")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pool:
    """Recorded outcomes; N candidates, P problems, losses (error, tokens)."""

    losses: Floats
    """(N, P, 2), in the order of proposal."""
    truncated: Floats
    """Share of answers that were cut off, (N,)."""
    blocks: Floats
    """Longest answer, tokens and seconds of some blocks of problems, (n, 3): what time goes with on the machine."""

    def take(self, candidates: NDArray[np.int64], problems: NDArray[np.int64] | slice = slice(None)) -> Pool:
        """Some candidates, on some problems."""
        return Pool(self.losses[candidates][:, problems], self.truncated[candidates], self.blocks)


def read(folder: Path) -> tuple[Config, Pool, Pool]:
    """A run's config, its two parents, and what it proposed."""
    with closing(Ledger.open(folder, read_only=True)) as ledger:
        config = Config.model_validate(ledger.meta("config"))
        origin = {ask.id: ask.origin for ask in ledger.asks()}
        entries = [entry for entry in ledger.entries(Split.SEARCH) if entry.measured]
        whole = Pool(
            np.array([per_problem(ledger.score(entry), OBJECTIVES) for entry in entries]),
            np.array([(entry.summary or {})["truncated"] for entry in entries]),
            np.zeros((0, 3)),
        )
    where = {kind: np.array([i for i, e in enumerate(entries) if origin[e.candidate_id] is kind]) for kind in Origin}
    return config, whole.take(where[Origin.PARENT]), whole.take(where[Origin.SEARCH])


@dataclass(frozen=True)
class Recorded:
    """What the replays draw from."""

    parents: Pool
    line: Pool
    searched: tuple[Pool, ...]
    random: tuple[Pool, ...]
    blocks: Floats

    @classmethod
    def of(cls, folder: Path) -> Recorded:
        """What record.py wrote into a folder, sorted by the configs' optimizers."""
        kinds: dict[str, list[Pool]] = {"line_sweep": [], "random": [], "searched": []}
        for name in RUNS:
            config, parents, pool = read(folder / name)
            kinds.get(config.optimizer.kind, kinds["searched"]).append(pool)
        blocks = np.array(json.loads((folder / BLOCKS_FILE).read_text()), float)
        return cls(parents, kinds["line_sweep"][0], tuple(kinds["searched"]), tuple(kinds["random"]), blocks)

    def save(self, path: Path) -> None:
        """One compressed file; answers are right or wrong, and at most 65,535 tokens long."""
        arrays = {}
        for name, pool in self._pools().items():
            errors, tokens = pool.losses[:, :, 0], pool.losses[:, :, 1]
            if not (np.isin(errors, (0.0, 1.0)).all() and (tokens == tokens.astype(np.uint16)).all()):
                raise SystemExit(f"{name}: expected one sample for each problem")
            arrays |= {
                f"{name}/wrong": np.packbits(errors.astype(bool), axis=1),
                f"{name}/tokens": tokens.astype(np.uint16),
                f"{name}/truncated": pool.truncated,
            }
        np.savez_compressed(path, blocks=self.blocks, **arrays)

    @classmethod
    def load(cls, path: Path) -> Recorded:
        """Inverse of save."""
        pools: dict[str, Pool] = {}
        with np.load(path) as file:
            blocks = file["blocks"]
            for name in dict.fromkeys(key.partition("/")[0] for key in file.files if "/" in key):
                wrong, tokens, truncated = (file[f"{name}/{field}"] for field in ("wrong", "tokens", "truncated"))
                errors = np.unpackbits(wrong, axis=1, count=tokens.shape[1])
                losses = np.stack([errors, tokens], axis=2).astype(float)
                pools[name] = Pool(losses, truncated, blocks)
        searched, random = (
            tuple(pool for name, pool in pools.items() if name.startswith(kind)) for kind in ("searched", "random")
        )
        return cls(pools["parents"], pools["line"], searched, random, blocks)

    def _pools(self) -> dict[str, Pool]:
        return {
            "parents": self.parents,
            "line": self.line,
            **{f"searched-{i}": pool for i, pool in enumerate(self.searched)},
            **{f"random-{i}": pool for i, pool in enumerate(self.random)},
        }

    def references(self, line_points: int) -> Floats:
        """Losses of the parents and of interior points of the line, evenly spaced, (R, P, 2)."""
        at = np.linspace(0, len(self.line.losses) - 1, line_points + 2).round().astype(int)[1:-1]
        return np.concatenate([self.parents.losses, self.line.losses[at]])

    def pool(self, seed: int) -> Pool:
        """A searched run and a random one, interleaved by lot, each in its own order."""
        parts = [self.searched[seed % len(self.searched)], self.random[seed % len(self.random)]]
        place = np.random.default_rng(seed).permutation(np.repeat([0, 1], [len(p.losses) for p in parts]))
        order = np.empty(len(place), int)
        for i, first in enumerate((0, len(parts[0].losses))):
            order[place == i] = first + np.arange((place == i).sum())
        losses, truncated = (
            np.concatenate(field) for field in zip(*[(p.losses, p.truncated) for p in parts], strict=True)
        )
        return Pool(losses, truncated, self.blocks).take(order)
