"""The data that crosses borders in `fitness`: problems, completions, verdicts, scores.

Shapes: P problems, S samples a problem.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

import numpy as np
from annotated_types import Ge, Lt
from numpy.typing import NDArray

if TYPE_CHECKING:  # torch takes seconds to import, and status, front and the tracker need none of it
    from torch import Tensor


Seed = Annotated[int, Ge(0), Lt(2**32)]
"""What every generator of random numbers takes."""


class Split(StrEnum):
    """Disjoint sets of problems. No flag mixes them."""

    SEARCH = "search"
    """What candidates are scored on while the search runs."""
    RESERVE = "reserve"
    """Set aside, disjoint from the others: no search scores it, `mergefront eval --split reserve` does."""
    HELD_OUT = "held_out"
    """Looked at once the search has ended, and never selected on."""


class Finish(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    """The model produced a stop token."""
    LENGTH = "length"
    """The token limit cut it off."""


class Verdict(IntEnum):
    """A grader's judgement of one completion. Stored as a byte: never renumber."""

    CORRECT = 0
    WRONG = 1
    """An answer was found, and it is not the right one."""
    UNPARSABLE = 2
    """No answer was found."""
    TRUNCATED = 3
    """Cut off by the token limit: counts as wrong whatever it says, so that a cap never buys accuracy."""
    TIMEOUT = 4
    """The grader could not tell in time: counts as wrong, and is reported apart."""


@dataclass(frozen=True)
class Problem:
    """A question with its reference answer."""

    question: str
    answer: str

    @property
    def id(self) -> str:
        """Hash of the question: the same problem has the same id wherever it comes from."""
        return hashlib.blake2b(self.question.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Decoding:
    """How text is drawn from a model. What is not given is as the interface parent's generation config says."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  # read by evo.config: an unknown key is an error

    samples: int = 1
    """Completions of each problem; more than one needs decoding that is not greedy."""
    greedy: bool | None = None
    """Always the likeliest token."""
    temperature: float | None = None
    """Of the softmax that tokens are drawn from."""
    top_p: float | None = None
    """Tokens are drawn from the likeliest that have this probability together."""
    top_k: int | None = None
    """Tokens are drawn from so many of the likeliest; 0 for all."""
    min_p: float | None = None
    """Tokens are drawn from those with at least this share of the likeliest one's probability."""
    repetition_penalty: float | None = None
    """What logits of tokens that occurred are divided (or, if negative, multiplied) by."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, besides the stop tokens; the text is cut off before them."""

    def __post_init__(self) -> None:
        limits = {
            "samples": (1, 10_000), "temperature": (1e-3, 100.0), "top_p": (1e-6, 1.0), "top_k": (0, 10**9),
            "min_p": (0.0, 1.0), "repetition_penalty": (0.1, 10.0),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"decoding.{name}: expected {low:g} to {high:g}, got {value!r}")
        if self.greedy and self.samples > 1:
            raise ValueError(f"decoding: {self.samples} samples of greedy decoding would all be the same: ask for 1")
        if "" in self.stop:
            raise ValueError("decoding.stop: an empty string would end every completion at once")


@dataclass(frozen=True)
class Completion:
    """What a model wrote for one prompt."""

    text: str
    """Decoded without the stop token."""
    n_tokens: int
    """Generated tokens, the stop token included; a completion that was cut off counts as the limit."""
    n_think_tokens: int
    """Of these, the tokens of the thinking part: all up to and including its end tag, 0 where there is none."""
    finish: Finish
    token_ids: tuple[int, ...] = ()
    """What was generated."""


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds a given completion."""

    total: float
    """Sum of the log-probabilities of its tokens, in nats; NaN if the model's logits are not finite."""
    n_tokens: int
    """Tokens of the completion, a stop token included."""
    blind: float
    """Log-probability of a token under a blind guess over the vocabulary."""


@dataclass(frozen=True)
class Score:
    """How a model did on a list of problems."""

    problem_ids: tuple[str, ...]
    verdicts: NDArray[np.uint8]
    """Shape (P, S), values of Verdict."""
    n_tokens: NDArray[np.int32]
    """Shape (P, S)."""
    n_think_tokens: NDArray[np.int32]
    """Shape (P, S)."""
    orderliness: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """Figure -> (P, S); see fitness.orderliness. Summarised; the ledger keeps more of parked candidates alone."""

    @property
    def n_problems(self) -> int:
        """P."""
        return len(self.problem_ids)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Shape (P, S)."""
        return np.asarray(self.verdicts == Verdict.CORRECT)

    @property
    def accuracy(self) -> float:
        """Share of correct samples."""
        return float(self.correct.mean())

    @property
    def accuracy_stderr(self) -> float:
        """Standard error of the accuracy, clustered by problem."""
        return _stderr(self.correct.mean(axis=1))

    @property
    def tokens_mean(self) -> float:
        """Mean generated tokens over all samples."""
        return float(self.n_tokens.mean())

    @property
    def tokens_mean_stderr(self) -> float:
        """Standard error of tokens_mean, clustered by problem."""
        return _stderr(self.n_tokens.mean(axis=1))

    @property
    def truncated(self) -> float:
        """Share of samples that the token limit cut off."""
        return float((self.verdicts == Verdict.TRUNCATED).mean())

    @property
    def n_generated(self) -> int:
        """Generated tokens in all."""
        return int(self.n_tokens.sum())

    def take(self, positions: NDArray[np.int64]) -> Score:
        """The score on some of the problems, in the order given."""
        return Score(
            tuple(self.problem_ids[i] for i in positions),
            self.verdicts[positions],
            self.n_tokens[positions],
            self.n_think_tokens[positions],
            {name: values[positions] for name, values in self.orderliness.items()},
        )

    def summary(self) -> dict[str, float | int | None]:
        """The figures that tables show, all as plain numbers; None where there is nothing to average."""
        solved = self.n_tokens[self.correct]
        return {
            "accuracy": self.accuracy,
            "accuracy_stderr": self.accuracy_stderr,
            "n_problems": self.n_problems,
            "tokens_mean": self.tokens_mean,
            "tokens_mean_stderr": self.tokens_mean_stderr,
            **_quantiles("tokens", self.n_tokens),
            "tokens_correct_mean": float(solved.mean()) if solved.size else None,
            **_quantiles("tokens_correct", solved),
            "think_tokens_mean": float(self.n_think_tokens.mean()),
            "truncated": self.truncated,
            "unparsable": float((self.verdicts == Verdict.UNPARSABLE).mean()),
            "grader_timeouts": float((self.verdicts == Verdict.TIMEOUT).mean()),
            "n_generated": self.n_generated,
            **{name: float(values.mean()) for name, values in self.orderliness.items()},
        }


class Task(Protocol):
    """A source of problems that can grade answers to them."""

    def problems(self, split: Split) -> list[Problem]:
        """The problems of a split, in a fixed order.

        Raises:
            ValueError: if there are fewer than the config asks for, or the data cannot be used.
        """
        ...

    def prompt(self, problem: Problem) -> str:
        """What the user says to the model, before any chat template."""
        ...

    def grade(self, problem: Problem, completion: Completion) -> Verdict:
        """Judge a completion. Never raises, whatever the text."""
        ...


class Engine(Protocol):
    """A resident model that weights are written into and text comes out of.

    The engine hosts the writing: weights may live in other processes, sharded or repacked, so it is told
    what to run where they live ("module:attribute"), never handed tensors. `fitness` so knows no recipes.

    Made with a checkpoint's folder; options are keyword-only parameters. `dtype` is one; `device`, `batch_size` and
    `decoding` are optional, and a config that sets one that is not there is refused. An engine that passes `options` on
    may have a class attribute `refused`: name -> why a config may not set it. KeyboardInterrupt, wherever it
    strikes, and errors of the writer go through, and leave no request or cache behind: the next update and the next
    text are those of a fresh engine.
    """

    capabilities: ClassVar[frozenset[str]]
    """Of "generate", "logprobs", "routing", "paths". Of the class: configs are checked before a model is loaded."""
    batch_size: int | None
    """Prompts decoded together; None before an automatic choice was made. Text depends on it: a run keeps it."""
    caveat: str | None
    """What readers of its scores have to know, in a sentence; None: nothing."""

    def host(self, writer: str, **arguments: Any) -> None:
        """Create the writer beside the weights: `writer` names a callable (slots, **arguments) whose result
        has a method `write(recipe)`. `slots` maps checkpoint tensor names to resident tensors.

        Where weights are packed and cannot be written in place, slots are None, a `device` is given, and what is
        called is `feed(recipe, load)`: it has to hand `load` an iterator of (checkpoint tensor name, tensor).
        """
        ...

    def update(self, recipe: Mapping[str, Any]) -> Any:
        """Let the writer write a recipe, then drop every cache that depends on the weights.

        Returns:
            what the writer's `write` (or `feed`) returned, as it is: the worker reads seconds and counts in it.
        """
        ...

    def room(self, prompts: Sequence[str]) -> int | None:
        """The most tokens that the model's context leaves for an answer to any of these prompts; None: any number."""
        ...

    def generate(
        self, prompts: Sequence[str], *, max_tokens: int, seeds: Sequence[int] | None = None
    ) -> list[Completion]:
        """Complete prompts (plain user messages), in order.

        A prompt that leaves room for less than max_tokens in the model's context is cut off there and counts
        max_tokens; one that leaves none gets an empty completion that counts the same.

        Args:
            prompts: a prompt may occur several times, for several samples of it.
            max_tokens: a longer completion is cut off.
            seeds: of each completion, in [0, 2^64); only they make samples differ. None: all 0.

        Raises:
            FloatingPointError: if the model's logits are not finite: a merge that has collapsed is a failed candidate.
        """
        ...

    def log_likelihood(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Likelihood]:
        """How likely the model finds completions of prompts, each ended by a stop token (teacher forcing).

        Only engines with the capability "logprobs" have this.
        """
        ...

    def slots(self) -> Mapping[str, Tensor]:
        """Checkpoint tensor name -> resident tensor (a view), for tests and writers in this process.

        Raises:
            NotImplementedError: if the weights cannot be viewed so.
        """
        ...


def _stderr(per_problem: NDArray[np.floating[Any]]) -> float:
    """Standard error of a mean; infinite for a single problem would help nobody, so 0."""
    n = len(per_problem)
    return float(per_problem.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0


def _quantiles(name: str, values: NDArray[np.int32]) -> dict[str, float | None]:
    if not values.size:
        return {f"{name}_median": None, f"{name}_p90": None}
    return {f"{name}_median": float(np.median(values)), f"{name}_p90": float(np.quantile(values, 0.9))}
