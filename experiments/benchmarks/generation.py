"""Tokens per second of the engine against `model.generate` with static batches, on problems of mixed length.

    python experiments/benchmarks/generation.py [CHECKPOINT]

Same model, prompts, order, batch size, token limit and precision, one thread, alternating in one process;
CPU seconds, of which the better of REPEATS runs counts for each side. Static batches are what a user writes around
`model.generate`: left-padded, each decoded until its longest row has ended.

The mix: problems with one to nine operations, answered by the parents' common ancestor, which was taught the
verbose and the brief style by the toss of a coin and, sampled at temperature 1, tosses it too (the two sides
then write other texts of the same distribution, so tokens per second are compared). Beside it the parents
themselves, greedy, whose answers differ in length by the problem alone. A checkpoint on the command line (an
instruct model with a chat template) gets questions of which most ask for a word and some for a paragraph.
"""

from __future__ import annotations

import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from record import record

from fitness.engines.transformers import TransformersEngine
from fitness.types import Decoding

HERE = Path(__file__).parent
REPEATS = 3
SUBJECTS = ("a river", "the moon", "bread", "a bicycle", "winter", "an orchestra", "copper", "a lighthouse")


def arithmetic_prompts(n: int) -> list[str]:
    """Chained arithmetic of one to nine operations."""
    rng = random.Random(0)
    return [
        str(rng.randrange(100)) + "".join(f"{rng.choice('+-')}{rng.randint(1, 9)}" for _ in range(rng.randint(1, 9)))
        for _ in range(n)
    ]


def question_prompts(n: int) -> list[str]:
    """Questions of which half ask for a word and half for a paragraph."""
    brief, long = "Answer with one word only: what is {} made of?", "Describe {} in one long paragraph."
    rng = random.Random(0)
    return [rng.choice([brief, brief, brief, long]).format(rng.choice(SUBJECTS)) for _ in range(n)]


def static_batches(
    engine: TransformersEngine, prompts: list[str], batch_size: int, max_tokens: int, sampled: bool
) -> list[list[int]]:
    """`model.generate`, batch by batch; the stop token is kept, padding is not."""
    model, pad, stop = engine._model, 0, engine._text.stop_ids
    written = []
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sampled else {"do_sample": False}
    torch.manual_seed(0)
    for start in range(0, len(prompts), batch_size):
        encoded = [engine._text.encode(prompt) for prompt in prompts[start : start + batch_size]]
        width = max(map(len, encoded))
        ids = torch.tensor([[pad] * (width - len(e)) + e for e in encoded])
        mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, pad_token_id=pad, **drawn)[
                :, width:
            ]
        for row in out.tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in stop), len(row))
            written.append(row[:end])
    return written


def timed(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    """Seconds, and what came out."""
    start = time.process_time()
    written = run()
    return time.process_time() - start, written


def compare(
    checkpoint: Path, prompts: list[str], batch_size: int, max_tokens: int, sampled: bool = False, **options: Any
) -> dict[str, Any]:
    """Both sides on one model."""
    decoding = Decoding(greedy=not sampled, temperature=1.0 if sampled else None)
    engine = TransformersEngine(
        str(checkpoint), dtype="float32", device="cpu", batch_size=batch_size, decoding=decoding, **options
    )

    def ours() -> list[list[int]]:
        completions = engine.generate(prompts, max_tokens=max_tokens, seeds=range(len(prompts)))
        return [list(c.token_ids) for c in completions]

    def theirs() -> list[list[int]]:
        return static_batches(engine, prompts, batch_size, max_tokens, sampled)

    runs = [(timed(ours), timed(theirs)) for _ in range(REPEATS)]
    ours_best, theirs_best = (min((run[side] for run in runs), key=lambda run: run[0]) for side in (0, 1))
    speeds = [sum(map(len, written)) / seconds for seconds, written in (ours_best, theirs_best)]
    lengths = sorted(map(len, ours_best[1]))
    return {
        "ratio": round(speeds[0] / speeds[1], 2),
        "tokens_per_second": round(speeds[0], 1),
        "tokens_per_second_generate": round(speeds[1], 1),
        "same_text": None if sampled else sum(map(list.__eq__, ours_best[1], theirs_best[1])) / len(prompts),
        "n_prompts": len(prompts),
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "tokens_mean": round(sum(lengths) / len(lengths), 1),
        "tokens_median": lengths[len(lengths) // 2],
        "tokens_max": lengths[-1],
    }


def compiled_step(checkpoint: Path, prompts: list[str], batch_size: int, max_tokens: int) -> dict[str, Any]:
    """The engine with and without `compile`, greedy, in turns; what is compiled is not counted, but said."""
    settings = {"dtype": "float32", "device": "cpu", "batch_size": batch_size, "decoding": Decoding(greedy=True)}
    engines = [TransformersEngine(str(checkpoint), compile=compile, **settings) for compile in (False, True)]

    def write(engine: TransformersEngine) -> list[list[int]]:
        return [list(c.token_ids) for c in engine.generate(prompts, max_tokens=max_tokens)]

    first = [timed(lambda engine=engine: write(engine))[0] for engine in engines]
    runs = [[timed(lambda engine=engine: write(engine)) for engine in engines] for _ in range(REPEATS)]
    eager, compiled = (min(run[side][0] for run in runs) for side in (0, 1))
    return {
        "ratio": round(eager / compiled, 2),
        "tokens_per_second": round(sum(map(len, runs[0][1][1])) / compiled, 1),
        "seconds_once": round(first[1] - compiled, 1),
        "same_text": sum(map(list.__eq__, runs[0][0][1], runs[0][1][1])) / len(prompts),
    }


def main() -> None:
    """Compare, print, and merge the figures into results.json."""
    torch.set_num_threads(1)
    parents = HERE.parent / "chimera_mini"
    options = {"options": {"experts_implementation": "eager"}}
    found = {
        f"chimera-mini {name}": compare(parents / name, arithmetic_prompts(512), 32, 200, name == "base", **options)
        for name in ("base", "reasoner", "concise")
    }
    for checkpoint in map(Path, sys.argv[1:]):
        found[json.loads((checkpoint / "config.json").read_text())["model_type"] + " of the command line"] = compare(
            checkpoint, question_prompts(64), 8, 128
        )
    machine = (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, 1 thread, torch {torch.__version__}"
    )
    for name, row in found.items():
        print(f"{name}: {row['ratio']} times model.generate, {row['tokens_per_second']} tokens/s; {row}")
    print(machine)
    compiled = compiled_step(parents / "reasoner", arithmetic_prompts(128), 32, 200)
    print(f"a compiled step: {compiled}")
    record(
        {"generation_over_generate": {**found, "machine": machine}, "compiled_step": {**compiled, "machine": machine}}
    )


if __name__ == "__main__":
    main()
