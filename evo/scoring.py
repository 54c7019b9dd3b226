"""Scores one checkpoint folder on tasks, outside any search: what `mergefront eval` does."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from evo.assemble import load_engine
from evo.checkpoint import Checkpoint
from evo.components import component_options, n_samples, validated
from evo.config import ConfigError, EngineConfig, TaskConfig
from fitness.engines import what_is_missing
from fitness.evaluator import Evaluator
from fitness.orderliness import Orderliness
from fitness.splits import problems_of
from fitness.tasks import TASKS
from fitness.types import Engine, Split
from search_spaces.recipe import Recipe, Source


def score_checkpoint(
    checkpoint: Path,
    tasks: Sequence[Mapping[str, Any]],
    engine: Mapping[str, Any],
    *,
    split: Split = Split.HELD_OUT,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The figures of a checkpoint on each task, in order; see Score.summary.

    Args:
        checkpoint: folder in the Hugging Face layout.
        tasks: as the config's section `task`.
        engine: as the config's section `engine`.
        split: of each task.
        seed: of the draws, where decoding is not greedy.

    Raises:
        ConfigError: for unknown tasks, engines or options.
        ValueError: if the folder is no checkpoint, or one that is not read here, or a task's data cannot be read.
        FloatingPointError: if the model's logits are not finite.
    """
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"no checkpoint in {checkpoint}: expected a folder with config.json and safetensors files")
    is_quantised = bool(Checkpoint.open(checkpoint).quantization)  # refused here, if nobody can read it
    configs = [validated(TaskConfig, task) for task in tasks]
    engine_config = validated(EngineConfig, engine)
    if missing := what_is_missing(engine_config.kind):
        raise ConfigError(missing)
    options = component_options(engine_config)
    built = [pkgutil.resolve_name(TASKS[config.kind])(**component_options(config)) for config in configs]
    problems = [  # bad data are told before the model is loaded
        problems_of(task, config.kind, [split])[split] for config, task in zip(configs, built, strict=True)
    ]
    resident = load_engine(engine_config, checkpoint, options)
    if is_quantised:
        _write(checkpoint, resident)
    samples, found = n_samples(options), []
    for config, task, asked in zip(configs, built, problems, strict=True):
        evaluator = Evaluator(resident, task, engine_config.max_tokens, Orderliness(), samples, seed)
        evaluator.check(asked)
        score, _ = evaluator.evaluate(asked)
        found.append({"task": config.kind, "split": str(split), "n_samples": samples, **score.summary()})
    return found


def _write(checkpoint: Path, resident: Engine) -> None:
    """Write a checkpoint into a resident model as a search writes it: a quantised one was not loaded."""
    recipe = Recipe({"it": Source(str(checkpoint))}, "it", "it", ())
    resident.host("evo.materializer:Materializer.hosted", sources={"it": str(checkpoint)})
    resident.update(recipe.to_dict())


def harness(checkpoint: Path, task: str, *, dtype: str, device: str, limit: int | None) -> dict[str, Any]:
    """Results of EleutherAI's lm-evaluation-harness on a checkpoint, with its own prompts and decoding.

    Args:
        checkpoint: a folder.
        task: a name that the harness knows, or the YAML file of a task of one's own.
        dtype: of the weights, as torch calls it.
        device: "auto" leaves it to the harness.
        limit: so many problems; None for all.

    Raises:
        ValueError: if the package is not installed, or does not know the task.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise ValueError(f"--harness needs lm-eval ({error}): pip install 'mergefront[harness]'") from error
    arguments = {"pretrained": str(checkpoint), "dtype": dtype}
    where: dict[str, Any] = {} if device == "auto" else {"device": device}
    if (file := Path(task)).suffix in (".yaml", ".yml") and file.is_file():
        from lm_eval.tasks import TaskManager

        where["task_manager"] = TaskManager(include_path=str(file.resolve().parent))
        task = str(yaml.load(file.read_text(), yaml.BaseLoader).get("task"))  # no objects are made
    try:
        results = lm_eval.simple_evaluate(model="hf", model_args=arguments, tasks=[task], limit=limit, **where)
    except KeyError as error:
        raise ValueError(f"lm-eval knows no task {task!r}: {error}") from error
    plain: dict[str, Any] = json.loads(json.dumps(results["results"], default=str))
    return plain


def describe(figures: Mapping[str, Any]) -> str:
    """The figures of one task in a few lines."""
    f = figures
    samples = f" x {f['n_samples']} samples" if f["n_samples"] > 1 else ""
    return (
        f"{f['task']} ({f['split']}, n = {f['n_problems']}{samples})\n"
        f"  accuracy      {100 * f['accuracy']:.1f} ± {100 * f['accuracy_stderr']:.1f} %\n"
        f"  tokens        mean {f['tokens_mean']:.1f} ± {f['tokens_mean_stderr']:.1f}, "
        f"median {f['tokens_median']:.0f}, p90 {f['tokens_p90']:.0f}\n"
        f"  thinking      {f['think_tokens_mean']:.1f} tokens, {100 * f['well_formed']:.1f} % well-formed\n"
        f"  orderliness   {100 * f['repeated_ngrams']:.1f} % repeated n-grams, "
        f"{f['corrections_per_100']:.2f} self-corrections per 100 tokens\n"
        f"  truncated     {100 * f['truncated']:.1f} %, without an answer {100 * f['unparsable']:.1f} %, "
        f"grader out of time {100 * f['grader_timeouts']:.1f} %"
    )
