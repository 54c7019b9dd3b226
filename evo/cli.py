"""The command `mergefront`: a thin layer over evo.search.Search.

Heavy libraries are imported inside the commands, so that --help, status and front answer at once.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from evo.errors import said
from evo.interrupts import interruptible

if TYPE_CHECKING:
    from evo.config import Budget

app = typer.Typer(
    name="mergefront",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # "rich" breaks lines where the docstring does
    help="Finds, among all merges of related language-model checkpoints, the ones that reason most accurately for "
    "the fewest output tokens, and writes the chosen one to disk.\n\n"
    "A session: `mergefront run search.yaml --out runs/first`, look with "
    "`mergefront front runs/first --held-out`, then "
    "`mergefront export runs/first --pick knee --out my-model`.",
)

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run (what --out named).")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="What to search, and on what.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run; made if it is not there.")],
    budget: Annotated[
        str | None,
        typer.Option(help="Extends a run, e.g. candidates=400 or hours=8,tokens=2e9: replaces the config's budget."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Start a search, or go on with it; ends with the front, scored on held-out problems.

    Ctrl-C (or `mergefront stop`) ends it cleanly; the same command goes on where it stopped.
    """
    from evo.terminal import print_ending, watching

    with _readable_errors(debug):
        _check_file(config)
        from evo.search import Search

        limits = _parse_budget(budget)
        search = Search.from_yaml(config, out)
        with watching(search) as watch:
            front = search.run(watch, limits)
        print_ending(front, search)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="What would be searched.")],
    out: Annotated[Path, typer.Option("--out", help="Where the run's files would go.")] = Path(),
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Also: bytes and seconds of each of so many processes, by layout.")
    ] = None,
    tokens: Annotated[float | None, typer.Option(min=1, help="Mean tokens of an answer, if you know.")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Load the model and measure, two minutes at most in all.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Predict memory, disk and time of a search before anything is loaded, and refuse what cannot fit.

    Reads the headers of the checkpoints, the tokenizer and the problems. Times are a range from the memory's
    bandwidth; --calibrate measures the parents and a merge instead.
    """
    with _readable_errors(debug):
        _check_file(config)
        from evo.config_file import load_config
        from evo.planning.calibrate import calibrated
        from evo.planning.machine import plan_search, ranks_report

        loaded = load_config(config)
        for line in ranks_report(loaded, ranks) if ranks else ():
            typer.echo(line)
        if tokens is not None and not tokens <= loaded.engine.max_tokens:
            raise ValueError(
                f"--tokens: expected at most engine.max_tokens ({loaded.engine.max_tokens}), got {tokens:g}"
            )
        planned = plan_search(loaded, out=out)
        for line in planned.report(tokens):
            typer.echo(line)
        for line in calibrated(planned, tokens) if calibrate else ():
            typer.echo(line)


@app.command()
def front(
    run_dir: RunDir,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: front, parents, baselines.")] = False,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Show held-out scores too (scores what has none yet).")
    ] = False,
    debug: Debug = False,
) -> None:
    """Show the Pareto front of a run: its best models at every length.

    The front is chosen on the search split. Held-out scores are shown beside it and never selected on.
    """
    with _readable_errors(debug):
        from evo.history import History
        from evo.ledger import Ledger
        from evo.terminal import print_front, watching
        from fitness.types import Split

        with closing(Ledger.open(run_dir, read_only=True)) as ledger:
            history = History(ledger)
        found = history.front
        if held_out and found.unscored():
            from evo.search import Search

            search = Search.open(run_dir)
            with watching(search, quiet=as_json) as watch:
                found = search.score_held_out(watch)
        if as_json:
            typer.echo(json.dumps(found.to_dict(Split.HELD_OUT if held_out else Split.SEARCH), indent=2))
        else:
            print_front(found, history.objectives, held_out=held_out)


@app.command()
def export(
    run_dir: RunDir,
    pick: Annotated[
        str, typer.Option(help="knee, max-accuracy, max-tokens=N, or the id or name of a member of the front.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the new checkpoint.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoint that is there.")] = False,
    debug: Debug = False,
) -> None:
    """Write a member of the front as a checkpoint that plain transformers loads.

    Picks read search scores only: knee is the member nearest to the ideal of no errors and no tokens,
    max-accuracy the most accurate, max-tokens=N the most accurate within N mean tokens.
    """
    with _readable_errors(debug, again="nothing is left of it; the same command starts anew"), interruptible():
        from evo.export import export as write
        from evo.search import Search

        name = Search.open(run_dir).front().pick(pick).ask.name
        _print_written(name, out, write(run_dir, pick, out, force=force).lines)


@app.command()
def merge(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE.yaml", help="A recipe.yaml of an export, or mergekit's YAML.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the new checkpoint.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoint that is there.")] = False,
    common_vocabulary: Annotated[
        bool, typer.Option("--common-vocabulary", help="Merge the rows that all have: a config's vocabulary: common.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Merge what a recipe says, without a search.

    Reads mergekit's YAML too: models or slices, weights as numbers, gradients over depth or filters, base_model,
    tokenizer_source. What it cannot do is refused with the line, and the nearest thing that it can.
    """
    with _readable_errors(debug, again="nothing is left of it; the same command starts anew"), interruptible():
        _check_file(recipe)
        from evo.merge_file import merge as write

        _print_written("the merge", out, write(recipe, out, force=force, common_rows=common_vocabulary).lines)


@app.command()
def status(run_dir: RunDir, debug: Debug = False) -> None:
    """Say how a run stands: running or not, budget spent, front so far."""
    with _readable_errors(debug):
        from evo.terminal import print_status

        print_status(run_dir)


@app.command()
def stop(run_dir: RunDir, debug: Debug = False) -> None:
    """Stop a running search after the candidate in flight; it can go on later."""
    with _readable_errors(debug):
        from evo import ledger
        from evo.run_folder import holder, is_held, request_stop

        if not ledger.exists(run_dir) and not is_held(run_dir):  # none yet while parents are hashed
            raise ledger.LedgerError(f"no run in {run_dir}")
        if not is_held(run_dir):
            typer.echo(f"nothing is running in {run_dir}")
            return
        request_stop(run_dir)
        typer.echo(f"asked {holder(run_dir)} to stop; waiting for the candidate in flight ...")
        while is_held(run_dir):
            time.sleep(0.2)
        typer.echo(f"stopped. Go on with: mergefront run CONFIG.yaml --out {shlex.quote(str(run_dir))}")


@app.command()
def sync(run_dir: RunDir, debug: Debug = False) -> None:
    """Bring MLflow up to date with a run, after MLflow was down or the run was killed."""
    with _readable_errors(debug):
        from evo.search import Search
        from evo.tracking import tracker

        tracking = Search.open(run_dir).config.tracking
        typer.echo(str(tracker.sync(run_dir, tracking.uri, tracking.experiment)))
        typer.echo(tracker.how_to_look(run_dir, tracking.uri))


@app.command("eval")
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder.")],
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task, and its options after a colon: arithmetic, bbh:name=navigate,held_out=100"),
    ] = None,
    engine: Annotated[str, typer.Option(help="Options of the engine: dtype=float32,device=cpu,batch_size=64")] = "",
    max_tokens: Annotated[int, typer.Option(help="Longer answers are cut off and count as wrong.")] = 1024,
    samples: Annotated[int, typer.Option(help="Answers to each problem.")] = 1,
    greedy: Annotated[
        bool | None, typer.Option("--greedy/--no-greedy", help="Instead of what the generation config says.")
    ] = None,
    split: Annotated[str, typer.Option(help="held_out, reserve or search.")] = "held_out",
    harness: Annotated[
        str | None, typer.Option(help="A task of lm-evaluation-harness (extra `harness`), or its YAML.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="With --harness: so many problems.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
    debug: Debug = False,
) -> None:
    """Score any checkpoint folder: accuracy with its standard error, tokens, thinking, orderliness.

    For example: mergefront eval my-model --task gsm8k:held_out=200 --task arithmetic --engine dtype=bfloat16
    """
    with _readable_errors(debug):
        from evo.scoring import describe, score_checkpoint
        from evo.scoring import harness as run_harness
        from fitness.types import Split

        if limit is not None and not harness:
            raise ValueError("--limit is for --harness; of a task, say --task NAME:held_out=N")
        if not task and not harness:
            raise ValueError("expected --task NAME, --harness TASK, or both")
        if split not in list(Split):
            raise ValueError(f"--split: expected one of {', '.join(Split)}, got {split!r}")
        options = _parse_options(engine)
        found = []
        if task:
            tasks = [_parse_task(text) for text in task]
            decoding = {"samples": samples, **({} if greedy is None else {"greedy": greedy})}
            if elsewhere := options.keys() & {"max_tokens", "decoding"}:
                raise ValueError(f"--engine {sorted(elsewhere)[0]}: say it as --max-tokens, --samples or --[no-]greedy")
            wanted = {"batch_size": "auto", **options, "max_tokens": max_tokens, "decoding": decoding}
            found = score_checkpoint(checkpoint, tasks, wanted, split=Split(split))
        if harness:
            dtype, device = options.get("dtype", "bfloat16"), options.get("device", "auto")
            results = run_harness(checkpoint, harness, dtype=dtype, device=device, limit=limit)
            found.append({"task": harness, "harness": results})
        if as_json:
            typer.echo(json.dumps(found, indent=2))
        else:
            for figures in found:
                shown = json.dumps(figures["harness"], indent=2) if "harness" in figures else describe(figures)
                typer.echo(shown)


@app.command()
def options() -> None:
    """Print all that a config may say: every key with its default, every kind, every merge method (as CONFIG.md)."""
    from evo.reference import reference

    typer.echo(reference(), nl=False)


def _print_written(name: str, out: Path, lines: Sequence[str]) -> None:
    console = Console(highlight=False, soft_wrap=True)  # a path is not broken over lines
    console.print(
        f"{name} is in [bold]{escape(str(out))}[/bold]: weights, recipe.yaml, accounting.json, a model card, and the "
        "config and tokenizer of its interface parent."
    )
    for line in lines:
        console.print(line, style="dim", markup=False)


def main() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


@contextmanager
def _readable_errors(debug: bool, *, again: str = "the same command goes on where this one ended") -> Iterator[None]:
    """Print an expected error as its message alone, and interrupts as what to do next."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; {again}.", err=True)
        raise typer.Exit(130) from None
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        if debug:
            raise
        print(f"error: {said(error)}", file=sys.stderr)
        raise typer.Exit(1) from None


def _check_file(file: Path) -> None:
    """Before torch is loaded, which takes seconds, whether there is anything to load it for.

    Raises:
        FileNotFoundError: if not.
    """
    if not file.exists():
        raise FileNotFoundError(f"cannot read {file}: there is no such file")


def _parse_task(text: str) -> dict[str, Any]:
    """Read "bbh:name=navigate,held_out=100", as the config's section `task` has it; see _parse_options."""
    kind, _, options = text.partition(":")
    return {"kind": kind, **_parse_options(options)}


def _parse_options(text: str) -> dict[str, Any]:
    """Read "dtype=float32,batch_size=64", each value as YAML.

    Raises:
        ValueError: for anything else.
    """
    import yaml

    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"expected key=value pairs joined by commas, got {text!r}")
        if key.strip() in options:
            raise ValueError(f"{key.strip()} is there twice in {text!r}")
        try:
            options[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"{key.strip()}: expected a number, a word or true, got {value!r}") from None
    return options


def _parse_budget(text: str | None) -> Budget | None:
    """Read "candidates=400,hours=8".

    Raises:
        ConfigError: for anything else.
    """
    from pydantic import ValidationError

    from evo.config import Budget, ConfigError

    if text is None:
        return None
    limits = {}
    try:
        for item in text.split(","):
            key, _, value = item.partition("=")
            number = float(value)
            if key.strip() in limits:
                raise ValueError("twice")
            limits[key.strip()] = int(number) if number.is_integer() and key.strip() != "hours" else number
        return Budget.model_validate(limits)
    except (ValueError, ValidationError):
        raise ConfigError(
            f"--budget: expected candidates=N, tokens=N or hours=X, joined by commas, each once, above 0; got {text!r}"
        ) from None


if __name__ == "__main__":
    main()
