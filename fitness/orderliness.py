"""How orderly a completion is written: repeated n-grams, self-corrections, and whether its thought is well-formed.

Beside accuracy and tokens, never an objective: R1T-Chimera was praised for shorter *and* more orderly thoughts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fitness.types import Completion

CORRECTIONS: Mapping[str, tuple[str, ...]] = {
    "en": ("wait", "hmm", "actually", "no,", "let me re-check", "let me recheck", "let me check again",
           "let me reconsider", "on second thought", "i made a mistake", "that's wrong", "that is wrong",
           "scratch that"),
    "de": ("moment", "halt", "hm", "eigentlich", "nein,", "noch einmal prüfen", "das ist falsch", "stimmt nicht"),
    "fr": ("attends", "attendez", "hmm", "en fait", "non,", "vérifions à nouveau", "c'est faux"),
    "es": ("espera", "hmm", "en realidad", "no,", "revisemos de nuevo", "eso está mal"),
    "ja": ("待って", "いや", "違う", "もう一度確認", "間違え"),
    "zh": ("等等", "等一下", "不对", "重新检查", "再检查", "我错了"),
}  # fmt: skip
"""Language -> what a writer says who corrects herself, in lower case."""


@dataclass(frozen=True)
class Orderliness:
    """What counts as repetition and as self-correction in the figures beside accuracy and tokens.

    Args:
        ngram: tokens in an n-gram.
        corrections: language -> phrases; all languages that are named are looked for. Without phrases, those that are
            known here: en, de, fr, es, ja, zh.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # read by evo.config

    ngram: int = 4
    corrections: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"en": CORRECTIONS["en"]})

    def __post_init__(self) -> None:
        unknown = [name for name, phrases in self.corrections.items() if not phrases and name not in CORRECTIONS]
        if unknown:
            raise ValueError(f"orderliness.corrections: no phrases are known for {unknown}: expected some in a list")
        if not 1 <= self.ngram <= 100:
            raise ValueError(f"orderliness.ngram: expected 1 to 100, got {self.ngram}")

    def measure(self, completion: Completion) -> dict[str, float]:
        """The three figures of one completion; see `repeated_share`, `n_corrections` and `is_well_formed`."""
        per_100 = 100.0 / max(1, completion.n_tokens)
        return {
            "repeated_ngrams": repeated_share(completion.token_ids, self.ngram),
            "corrections_per_100": self.n_corrections(completion.text) * per_100,
            "well_formed": float(is_well_formed(completion)),
        }

    def n_corrections(self, text: str) -> int:
        """Phrases of correction in a text."""
        return sum(1 for _ in self._pattern.finditer(text.casefold())) if self._pattern else 0

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        lists = (phrases or CORRECTIONS[language] for language, phrases in self.corrections.items())
        phrases = {phrase.casefold() for listed in lists for phrase in listed if phrase}
        longest_first = sorted(phrases, key=lambda phrase: (-len(phrase), phrase))
        # Scripts without blanks between words have no word borders to ask for.
        guarded = [
            rf"(?<!\w){re.escape(p)}" + (r"(?!\w)" if p[-1].isalnum() else "")
            if p.isascii() or " " in p
            else re.escape(p)
            for p in longest_first
        ]
        return re.compile("|".join(guarded)) if guarded else None


def repeated_share(token_ids: Sequence[int], n: int) -> float:
    """1 - distinct n-grams / n-grams: seq-rep-n of Welleck et al. (2020), eq. 5. 0 for less than one n-gram."""
    if len(token_ids) < n:
        return 0.0
    ids = np.asarray(token_ids, np.uint64)
    hashes: NDArray[np.uint64] = np.zeros(len(ids) - n + 1, np.uint64)
    for i in range(n):  # a polynomial modulo 2^64 stands for the n-gram
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[i : len(ids) - n + 1 + i] + np.uint64(1)
    return float(1.0 - len(np.unique(hashes)) / len(hashes))


def is_well_formed(completion: Completion) -> bool:
    """Whether a thought is closed once and an answer follows; a completion without a thought is not."""
    thought, tag, answer = completion.text.partition("</think>")
    return bool(tag) and "</think>" not in answer and "<think>" not in answer and bool(answer.strip()) and (
        thought.count("<think>") <= 1
    )  # fmt: skip
