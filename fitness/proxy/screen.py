"""The collapse screen: what no later problem can save is found on a few prompts.

Two signs, each of which is enough. The first few answers all run into the token limit, where a reference model
ended its own, and repeat themselves. Or the model finds the correct answers of
every parent unlikely: per token, further than half the way down to a blind guess over the vocabulary. Logits
that are not finite are an engine's error, and so a failed candidate, without any screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fitness.types import Engine, Score, Verdict

REPETITIVE = 0.5
"""Share of repeated n-grams above which an answer that never ends is a loop."""
BLIND = 0.5
"""Share of a blind guess's loss, ln(vocabulary) nats a token, that no parent's answers may reach."""


@dataclass(frozen=True)
class Trace:
    """A correct answer of a parent."""

    parent: str
    prompt: str
    text: str


@dataclass(frozen=True)
class Screen:
    """What is looked at."""

    n_problems: int
    """Of the first block; 0 leaves the answers alone."""
    ended: NDArray[np.bool_]
    """Whether some reference model ended its answer to each problem of the split, (P,)."""
    traces: tuple[Trace, ...] = ()
    """None leaves the likelihood alone."""

    def collapsed(self, score: Score, problems: NDArray[np.int64]) -> str | None:
        """Why the first answers show that a model is dead; None if they do not.

        Args:
            score: of a block.
            problems: its problems' positions in the split, (n,).
        """
        asked = np.flatnonzero(self.ended[problems])[: self.n_problems]
        if len(asked) < min(2, self.n_problems) or not self.n_problems:
            return None
        if not (score.verdicts[asked] == Verdict.TRUNCATED).all():
            return None
        repeated = float(score.orderliness["repeated_ngrams"][asked].mean())
        if repeated < REPETITIVE:
            return None
        return f"no answer to the first {len(asked)} problems ends, {repeated:.0%} of their n-grams are repeated"

    def unlikely(self, engine: Engine) -> tuple[str | None, int]:
        """Why likelihoods show that the resident model is dead, if they do, and the tokens that were forced."""
        if not self.traces:
            return None, 0
        found = engine.log_likelihood([t.prompt for t in self.traces], [t.text for t in self.traces])
        nats = nats_per_token(self.traces, [f.total for f in found], [f.n_tokens for f in found])
        best, blind = max(nats.values()), found[0].blind
        reason = f"correct answers of parents get {best:.2f} nats a token, a blind guess {blind:.2f}"
        return (reason if not best > BLIND * blind else None), sum(f.n_tokens for f in found)


def nats_per_token(traces: Sequence[Trace], totals: Sequence[float], n_tokens: Sequence[int]) -> Mapping[str, float]:
    """Parent -> mean log-likelihood of a token of its traces."""
    sums: dict[str, list[float]] = {}
    for trace, total, n in zip(traces, totals, n_tokens, strict=True):
        s = sums.setdefault(trace.parent, [0.0, 0.0])
        s[0], s[1] = s[0] + total, s[1] + n
    return {parent: total / max(1.0, n) for parent, (total, n) in sums.items()}
