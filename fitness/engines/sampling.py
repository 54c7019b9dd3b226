"""From logits to the next token, as a generation config says: greedy, or drawn with numbers of our own.

The uniform number of a draw is a hash of (seed of the completion, step): a row's draw depends neither on its
place in the batch nor on what else is in it, and every candidate meets the same numbers, which makes
differences between candidates less noisy (common random numbers).

Shapes: B rows, V vocabulary, L tokens of the longest row. Knows nothing of models, caches and text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fitness.types import Decoding

_IGNORED = ("no_repeat_ngram_size", "typical_p", "epsilon_cutoff", "eta_cutoff", "bad_words_ids", "num_beams")
"""Settings of a generation config that would change the text and that are not followed here."""


@dataclass(frozen=True)
class Settings:
    """How the next token is picked; None: off."""

    greedy: bool
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def of(cls, generation: GenerationConfig, decoding: Decoding) -> Settings:
        """What `decoding` sets, else the generation config; what neither sets is off.

        Args:
            generation: of the interface parent.
            decoding: what the config of the run wants otherwise.

        Raises:
            ValueError: if the generation config asks for what is not followed here, or if several samples are
                wanted of greedy decoding.
        """

        def setting(name: str, neutral: float) -> Any:
            chosen = getattr(decoding, name)
            value = getattr(generation, name, None) if chosen is None else chosen
            return None if value == neutral else value

        unmet = [name for name in _IGNORED if getattr(generation, name, None) not in (None, 0, 1, 1.0, 0.0)]
        if unmet:
            raise ValueError(
                f"generation_config.json sets {', '.join(unmet)}, which this engine does not follow: remove it there, "
                "or take another parent as the interface"
            )
        greedy = not generation.do_sample if decoding.greedy is None else decoding.greedy
        if greedy and decoding.samples > 1:
            raise ValueError(
                f"decoding.samples is {decoding.samples}, but decoding is greedy, so all samples would be the same: "
                "set decoding.greedy to false, or samples to 1"
            )
        penalty = setting("repetition_penalty", 1.0)
        neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        idle = [name for name in neutral if getattr(decoding, name) is not None]
        if greedy and idle and decoding.greedy is None:
            raise ValueError(
                f"decoding sets {', '.join(idle)}, but the interface parent's generation config says do_sample: false, "
                "so nothing would be drawn: set decoding.greedy to false, or leave them out"
            )
        if greedy:
            return cls(True, repetition_penalty=penalty)
        cuts = {name: setting(name, value) for name, value in neutral.items()}
        return cls(False, **cuts, repetition_penalty=penalty)

    @property
    def logit_bytes(self) -> int:
        """Of a row and a token of the vocabulary while the next one is picked, as measured: logits, copies of them in
        float32 and float64, and, where the likeliest are cut off, their order.
        """
        if self.greedy:
            return 4 if self.repetition_penalty is None else 14
        return 24 if self.top_k is None and self.top_p is None else 32


class Sampler:
    """Picks the next token of each row."""

    def __init__(self, settings: Settings) -> None:
        s = settings
        self.greedy = s.greedy
        self._penalty = LogitsProcessorList(
            [RepetitionPenaltyLogitsProcessor(s.repetition_penalty)] if s.repetition_penalty is not None else []
        )
        self._warpers = LogitsProcessorList()
        if s.temperature is not None:
            self._warpers.append(TemperatureLogitsWarper(float(s.temperature)))
        if s.top_k is not None:
            self._warpers.append(TopKLogitsWarper(int(s.top_k)))
        if s.top_p is not None:
            self._warpers.append(TopPLogitsWarper(float(s.top_p)))
        if s.min_p is not None:
            self._warpers.append(MinPLogitsWarper(float(s.min_p)))

    def __call__(self, logits: Tensor, history: Tensor, seeds: NDArray[np.uint64], steps: NDArray[np.int64]) -> Tensor:
        """The next token of each row, shape (B,).

        Args:
            logits: (B, V), of any float type.
            history: (B, L) prompt and text so far; short rows are filled up with tokens that they hold.
            seeds: (B,) of the completions.
            steps: (B,) tokens that each row has generated so far.
        """
        if self._penalty:
            logits = self._penalty(history, logits.float())
        if self.greedy:
            return logits.argmax(dim=-1)
        scores = self._warpers(history, logits.float())
        # In float64 the order of summation does not move a draw over the border between two tokens.
        cumulative = torch.softmax(scores, dim=-1).double().cumsum(dim=-1)
        draws = torch.from_numpy(uniforms(seeds, steps)).to(logits.device)
        drawn = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True).squeeze(1)
        return drawn.clamp_(max=logits.shape[-1] - 1)

    @property
    def needs_history(self) -> bool:
        """Whether what was said before changes what is said next."""
        return len(self._penalty) > 0


def uniforms(seeds: NDArray[np.uint64], steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each (seed, step): SplitMix64 (Steele, Lea, Flood 2014) at that place of its stream."""
    with np.errstate(over="ignore"):
        z = seeds + (steps.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.asarray((z >> np.uint64(11)).astype(np.float64) * 2.0**-53)
