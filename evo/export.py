"""Writes a member of a front to disk as a checkpoint that plain `transformers` loads.

The tensors come from the same function that wrote them into the resident model, rounded to the same stored
dtype, so that loading the export gives the bits that were scored. Files are laid out as the interface parent's are, and
one file at a time is held in memory. Everything is written beside the target and moved in place at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from evo.assemble import build_space, open_sources, source_digests
from evo.card import model_card
from evo.checkpoint import INDEX_FILE, INTERFACE_FILES, SINGLE_FILE, Checkpoint
from evo.config import Config
from evo.encodings.rounding import Rounding
from evo.front import Row, read_front
from evo.ledger import Ledger
from evo.materializer import Materializer
from search_spaces.recipe import Recipe


class ExportError(ValueError):
    """An export cannot be written where it was asked for."""


def export(run: Path, pick: str, out: Path, *, force: bool = False) -> Path:
    """Export a member of a run's front.

    Args:
        run: the run's folder.
        pick: see Front.pick.
        out: the new checkpoint's folder.
        force: replace `out` if it is not empty.

    Returns:
        `out`.

    Raises:
        ExportError: if `out` is not empty, or is or holds one of the parents or the run itself.
        PickError: if there is no such member.
        CheckpointError: if a parent cannot be read, or has changed since the run.
    """
    ledger = Ledger.open(run, read_only=True)
    with contextlib.closing(ledger):
        config = Config.model_validate(ledger.meta("config"))
        check_target(out, [*config.sources.values(), run], force)
        front = read_front(ledger)
        row = front.pick(pick)
        sources = open_sources(config)
        _check_unchanged(config, ledger.meta("digests"))
        recipe = recipe_of(row, config, sources, ledger.meta("digests"))
    card = model_card(row, recipe, front, config)
    write_checkpoint(recipe, sources, out, {"recipe.yaml": recipe.to_yaml(), "README.md": card}, force=force)
    return out


def recipe_of(row: Row, config: Config, sources: dict[str, Checkpoint], digests: dict[str, str]) -> Recipe:
    """The recipe of a front's row."""
    if row.ask.recipe is not None:
        return row.ask.recipe
    assert row.ask.genome is not None, "an ask has a recipe or a genome"
    return build_space(config, sources, digests).decode(row.ask.genome)


def check_target(out: Path, inputs: list[Path], force: bool) -> None:
    """Refuse a target that would overwrite something.

    Raises:
        ExportError: saying what is in the way.
    """
    target = out.resolve()
    for path in inputs:
        if target == path.resolve() or target in path.resolve().parents:
            raise ExportError(f"{out} is or contains {path}, which is being read: choose another folder")
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file; expected a new or empty folder")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise ExportError(f"{out} is not empty: choose another folder, or replace it with --force")


def write_checkpoint(
    recipe: Recipe, sources: dict[str, Checkpoint], out: Path, extra_files: dict[str, str], *, force: bool = False
) -> None:
    """Write a recipe's checkpoint, whole or not at all."""
    with _beside(out, force) as folder:
        interface, rounding = sources[recipe.interface], Rounding()
        _write_weights(Materializer(sources).stream(recipe, rounding), interface, folder)
        _copy_interface(interface, folder)
        for name, text in extra_files.items():
            (folder / name).write_text(text)
        if rounding.errors:
            with (folder / "README.md").open("a") as card:
                card.write(f"\n## Rounding\n\n{rounding.summary()}\n")


def _write_weights(tensors: Iterator[tuple[str, Tensor]], interface: Checkpoint, folder: Path) -> None:
    """One file at a time. `tensors` comes in the order of the index, which may jump between files: a file is
    written as soon as it is complete.
    """
    weight_map = interface.written_map()
    missing = dict.fromkeys(weight_map.values(), 0)
    for file in weight_map.values():
        missing[file] += 1
    waiting: dict[str, dict[str, Tensor]] = {file: {} for file in missing}
    n_bytes = 0
    for name, tensor in tensors:
        file = weight_map[name]
        waiting[file][name] = tensor.contiguous()
        n_bytes += tensor.numel() * tensor.element_size()
        if len(waiting[file]) == missing[file]:
            save_file(waiting.pop(file), folder / file, metadata={"format": "pt"})
    assert not waiting, "every tensor of every file has been streamed"
    if set(weight_map.values()) != {SINGLE_FILE}:
        index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2))


def _copy_interface(interface: Checkpoint, folder: Path) -> None:
    for name in INTERFACE_FILES:
        if (interface.path / name).is_file():
            shutil.copyfile(interface.path / name, folder / name)
    if any(entry.encoding != entry.encoding.output for entry in interface.entries.values()):
        config = {key: value for key, value in interface.config().items() if key != "quantization_config"}
        (folder / "config.json").write_text(json.dumps(config, indent=2))


def _check_unchanged(config: Config, recorded: dict[str, Any]) -> None:
    changed = [name for name, digest in source_digests(config).items() if digest != recorded.get(name)]
    if changed:
        raise ExportError(
            f"{', '.join(changed)}: the content of this checkpoint has changed since the run, so an export would "
            "not be the model that was scored. Restore it, or run the search again."
        )


@contextlib.contextmanager
def _beside(out: Path, force: bool) -> Iterator[Path]:
    """A fresh folder next to `out` that takes its place if the block succeeds, and is removed if not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        for file in folder.iterdir():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        if out.is_dir() and force:
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
            out.rename(old / "was")
            folder.rename(out)
            shutil.rmtree(old)
        else:
            folder.rename(out)  # onto nothing, or onto an empty folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
