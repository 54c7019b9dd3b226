"""Writes a member of a front to disk as a checkpoint that plain `transformers` loads.

The tensors come from the same function that wrote them into the resident model, rounded to the same stored
dtype, so that loading the export gives the bits that were scored. Files are laid out as the interface parent's are.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evo.accounting import ACCOUNTING_FILE, Account, account, summary, to_json
from evo.assemble import build_space, open_sources, source_digests
from evo.card import model_card
from evo.chat_template import put_template
from evo.checkpoint import Checkpoint
from evo.config import Config
from evo.dtypes import config_in
from evo.encodings.rounding import Rounding
from evo.front import Front, Row
from evo.history import History
from evo.hub import recipe_sources
from evo.in_place import beside, free_disk
from evo.ledger import Ledger
from evo.materializer import Materializer
from evo.mergekit.writer import MERGEKIT_FILE, CannotSayError, write_mergekit
from evo.stamps import Stamps
from evo.types import Origin
from evo.vocabulary import common_rows
from evo.weights import write_weights
from search_spaces.recipe import Recipe


class ExportError(ValueError):
    """An export cannot be written where it was asked for."""


@dataclass(frozen=True)
class Told:
    """What is said of a written checkpoint: in files beside it, in its card, and on the terminal."""

    files: dict[str, str] = field(default_factory=dict)
    """Name -> text."""
    notes: tuple[str, ...] = ()
    """On what was asked for."""
    of_mergekit: tuple[str, ...] = ()
    """On its file, or why there is none."""
    accounts: dict[str, Account] = field(default_factory=dict)
    """Of the tensors, once they are written."""

    @classmethod
    def of(cls, recipe: Recipe, sources: dict[str, Checkpoint], notes: Sequence[str] = ()) -> Told:
        """The recipe, in our words and if possible in mergekit's.

        Args:
            recipe: what is built.
            sources: name -> checkpoint.
            notes: what else is to be said.
        """
        said = replace(recipe, vocabulary="common") if common_rows(sources) else recipe
        files, of_mergekit = {"recipe.yaml": said.to_yaml()}, list[str]()
        try:
            files[MERGEKIT_FILE], found = write_mergekit(recipe, sources)
            of_mergekit += [f"{MERGEKIT_FILE}: {note}" for note in found or ["the same merge, for mergekit"]]
        except CannotSayError as error:
            of_mergekit.append(f"no {MERGEKIT_FILE}: {error}")
        return cls(files, tuple(notes), tuple(of_mergekit))

    @property
    def lines(self) -> tuple[str, ...]:
        """For the terminal."""
        return (*self.notes, summary(self.accounts), *self.of_mergekit)


def export(run: Path, pick: str | int, out: Path, *, force: bool = False) -> Told:
    """Export a member of a run's front.

    Args:
        run: the run's folder.
        pick: see Front.pick.
        out: the new checkpoint's folder.
        force: replace the checkpoint that is in `out`.

    Returns:
        what is to be said of it.

    Raises:
        ExportError: if `out` is not empty, is or holds one of the parents or the run itself, or has no room.
        PickError: if there is no such member.
        CheckpointError: if a parent cannot be read, or has changed since the run.
    """
    ledger = Ledger.open(run, read_only=True)
    with contextlib.closing(ledger):
        config = Config.model_validate(ledger.meta("config"))
        check_target(out, [*config.sources.values(), run], force)
        front = History(ledger).front
        row = front.pick(pick)
        if gone := [f"{name} ({path})" for name, path in config.sources.items() if not path.is_dir()]:
            raise ExportError(
                f"{', '.join(gone)}: not there any more. If it was moved, change its path in the config and run the "
                "search again, which takes note of it and evaluates nothing anew; then export"
            )
        sources = open_sources(config)
        caveat = ledger.meta("caveat")
        digests = ledger.meta("digests")
        _check_unchanged(config, digests)
        found = row.ask.recipe_in(lambda: build_space(config, sources, digests))
        recipe = replace(found, sources=recipe_sources(config.sources, digests))  # a recorded one names where they lay
    told = Told.of(recipe, sources, _of_no_merge(row, front))
    return write_checkpoint(
        recipe, sources, out, told, lambda lines: model_card(row, recipe, front, config, lines, caveat), force=force
    )


def _of_no_merge(row: Row, front: Front) -> list[str]:
    """What to say of a pick, such as the knee, that turns out to be a parent."""
    if row.ask.origin is not Origin.PARENT:
        return []
    merges = [member.ask.name for member in front.members if member.ask.origin is not Origin.PARENT]
    return [f"{row.ask.name} is a parent, and no merge; merges on the front: {', '.join(merges) or 'none'}"]


def check_target(out: Path, inputs: list[Path], force: bool) -> None:
    """Refuse a target that would overwrite something.

    Raises:
        ExportError: saying what is in the way.
    """
    target = out.resolve()
    for path in inputs:
        if target == path.resolve() or target in path.resolve().parents:
            raise ExportError(f"{out} is or contains {path}, which is being read: choose another folder")
    if target.is_mount():
        raise ExportError(f"{out} is where a disk is mounted, and cannot be moved in place: name a folder in it")
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file; expected a new or empty folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not force:
        raise ExportError(f"{out} is not empty: choose another folder, or replace it with --force")
    for folder, whose in ((Path.cwd(), "the folder that you are in"), (Path.home(), "your home")):
        if target in (folder.resolve(), *folder.resolve().parents):
            raise ExportError(f"{out} is or contains {whose}, and would be deleted: choose another folder")
    if not (out / "config.json").is_file():
        raise ExportError(f"{out} holds no checkpoint, which is all that --force replaces: choose another folder")


def write_checkpoint(
    recipe: Recipe,
    sources: dict[str, Checkpoint],
    out: Path,
    told: Told | None = None,
    card: Callable[[tuple[str, ...]], str] | None = None,
    *,
    force: bool = False,
) -> Told:
    """Write a recipe's checkpoint, whole or not at all.

    Args:
        recipe: what to build.
        sources: name -> checkpoint.
        out: the new checkpoint's folder.
        told: what is said of it besides; None for nothing but accounting.json.
        card: README.md, of the lines that the terminal gets.
        force: replace the checkpoint that is in `out`.

    Returns:
        what is to be said of it.

    Raises:
        CheckpointError: if a parent cannot be read, or holds NaN or Inf.
        ExportError: if the disk is full, or a parent changed while it was merged.
    """
    out = out.resolve()  # a link stays one
    _check_room(sources[recipe.interface], out)
    stamps = Stamps.of_weights(sources.values())
    with _told_of_the_disk(out), beside(out, replace=force) as folder, _spared_the_collector():
        interface, rounding = sources[recipe.interface], Rounding()
        materializer = Materializer(sources)
        hashes = write_weights(materializer.stretches(recipe, rounding), interface, folder)
        _copy_interface(interface, recipe.dtype, folder)
        if recipe.chat_template is not None:
            put_template(recipe.chat_template, folder)
        told = replace(told or Told(), accounts=account(recipe, sources, materializer.copied))
        (folder / ACCOUNTING_FILE).write_text(to_json(told.accounts, hashes))
        for name, text in told.files.items():
            (folder / name).write_text(text)
        if card:
            (folder / "README.md").write_text(card(told.lines))
        if rounding.errors:
            with (folder / "README.md").open("a") as readme:
                readme.write(f"\n## Rounding\n\n{rounding.summary()}\n")
        if changed := stamps.changed():
            raise ExportError(
                f"{changed[0]} has been written to, or replaced, while it was merged, so nothing of {out} is left. "
                "Merge again once it stays as it is."
            )
    return told


def _check_room(interface: Checkpoint, out: Path) -> None:
    """A merge takes hours for a large model: better to know now. What MXFP4 becomes is larger than its file."""
    needed = sum(header.n_bytes for header in interface.written_headers().values())
    if (free := free_disk(out)) < needed:
        raise ExportError(f"{out}: expected {needed / 1e9:.2f} GB of free disk space, found {free / 1e9:.2f} GB")


def _copy_interface(interface: Checkpoint, dtype: str | None, folder: Path) -> None:
    for path in interface.companions():
        shutil.copyfile(path, folder / path.name)
    config = interface.config()
    said = config_in(config, dtype) if dtype else dict(config)
    if any(type(entry.encoding) is not type(entry.encoding.output) for entry in interface.entries.values()):
        said.pop("quantization_config", None)  # of what is written as plain numbers
    if said != config:
        (folder / "config.json").write_text(json.dumps(said, indent=2))


def _check_unchanged(config: Config, recorded: dict[str, Any]) -> None:
    changed = [name for name, digest in source_digests(config).items() if digest != recorded.get(name)]
    if changed:
        raise ExportError(
            f"{', '.join(changed)}: the content of this checkpoint has changed since the run, so an export would "
            "not be the model that was scored. Restore it, or run the search again."
        )


@contextlib.contextmanager
def _told_of_the_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # a full disk, most likely
        raise ExportError(f"{out} cannot be written, and nothing of it is left: {error}") from error


@contextlib.contextmanager
def _spared_the_collector() -> Iterator[None]:
    """What is there now (all modules, headers of thousands of tensors) is not looked through for garbage again and
    again: that took an eighth of a small export's time.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
