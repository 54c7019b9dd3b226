"""Merges what a file says, without a search: a recipe of ours, or mergekit's YAML. Their keys tell them apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from evo.adapter import open_checkpoints
from evo.card import merge_card
from evo.checkpoint import Checkpoint, check_compatible
from evo.export import Told, check_target, write_checkpoint
from evo.hub import HubError, locate, origin
from evo.mergekit.document import Document
from evo.mergekit.reader import to_recipe
from evo.mergekit.settings import MergekitError
from evo.places import at, line_numbers
from search_spaces.recipe import Recipe, Source

_Opener = Callable[[Mapping[str, Path]], dict[str, Checkpoint]]


class RecipeError(ValueError):
    """A recipe file cannot be used; the message names the place and the remedy."""


def merge(file: Path, out: Path, *, force: bool = False, common_rows: bool = False) -> Told:
    """Merge what a file says into a new checkpoint.

    Args:
        file: a recipe of ours or mergekit's YAML; folders in it are taken relative to it where they are there,
            else relative to the working directory; other names are ids on the Hub.
        out: the new checkpoint's folder.
        force: replace `out` if it is not empty.
        common_rows: let vocabularies differ by added and padded rows (see evo.vocabulary), as a recipe may say itself.

    Returns:
        what is to be said of it.

    Raises:
        RecipeError: if the file cannot be read, asks for what is not here, or names a checkpoint that is nowhere.
        CheckpointError: if a parent cannot be read, holds NaN or Inf, or does not fit the others.
        ExportError: if `out` is not empty, is or holds one of the parents, or has no room.
    """
    check_target(out, [], force)  # before anything is downloaded
    text, data = _load(file)
    read = _read_mergekit if "merge_method" in data else _read_recipe
    common_rows = common_rows or data.get("vocabulary") == "common"
    recipe, sources, notes = read(file, text, data, lambda paths: _open(paths, out, force, common_rows))
    told = Told.of(recipe, sources)
    told = replace(told, lines=(*notes, *told.lines))
    files = {**told.files, "README.md": merge_card(recipe, out.name, told.lines)}
    write_checkpoint(recipe, sources, out, files, told.accounts, force=force)
    return told


def _load(file: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = file.read_text()
        data = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {file}: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{file} is not valid YAML, or holds several documents: {error}") from error
    if not isinstance(data, dict) or not ("merge_method" in data or "version" in data):
        raise RecipeError(
            f"{file}: expected a recipe (with the keys version, sources and rules; an export has one) or a file of "
            "mergekit's (with the key merge_method)"
        )
    return text, data


def _read_recipe(
    file: Path, text: str, data: dict[str, Any], opened: _Opener
) -> tuple[Recipe, dict[str, Checkpoint], list[str]]:
    try:
        recipe = Recipe.from_dict(data)
    except ValueError as error:
        raise RecipeError(f"{file}: {error}") from error
    paths = _located({name: source.place for name, source in recipe.sources.items()}, file)
    sources = opened(paths)
    sources[recipe.interface].written_map()  # an adapter has none
    for name, source in recipe.sources.items():
        if source.digest is not None and sources[name].digest() != source.digest:
            raise RecipeError(
                f"{file}: {name}: the content of {paths[name]} is not what the recipe was written for. "
                "Get that checkpoint, or take out its digest to merge what is there."
            )
    named = {name: _source(paths[name], source.digest) for name, source in recipe.sources.items()}
    return replace(recipe, sources=named), sources, []


def _read_mergekit(
    file: Path, text: str, data: dict[str, Any], opened: _Opener
) -> tuple[Recipe, dict[str, Checkpoint], list[str]]:
    try:
        document = Document(data)
        paths = _located(document.paths, file)
        sources = opened(paths)
        sources[document.interface].written_map()
        recipe = to_recipe(document, sources, {name: _source(path) for name, path in paths.items()})
        return recipe, sources, document.notes
    except MergekitError as error:
        raise RecipeError(at(file, line_numbers(text), error.place, str(error), "mergekit")) from None


def _located(paths: Mapping[str, str], file: Path) -> dict[str, Path]:
    """Name -> folder: beside the file if it is there, else from here, else the Hub's."""
    beside, found = file.resolve().parent, {}
    for name, path in paths.items():
        here = Path(path).is_dir() and not (beside / path).is_dir()
        try:
            found[name] = Path(path) if here else locate(Path(path), beside)
        except HubError as error:
            raise RecipeError(f"{file}: {name}: {error}") from error
    return found


def _source(folder: Path, digest: str | None = None) -> Source:
    place, revision = origin(folder)
    return Source(place, digest, revision)


def _open(paths: Mapping[str, Path], out: Path, force: bool, common_rows: bool) -> dict[str, Checkpoint]:
    check_target(out, list(paths.values()), force)
    sources = open_checkpoints(paths)
    check_compatible(sources, common_rows=common_rows)
    return sources
