"""Merges what a file says, without a search: a recipe of ours, or mergekit's YAML. Their keys tell them apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evo.adapter import Footing, open_checkpoints
from evo.card import merge_card
from evo.chat_template import check_template
from evo.checkpoint import Checkpoint
from evo.compatible import check_compatible, differing_settings
from evo.dtypes import store_as
from evo.export import Told, check_target, write_checkpoint
from evo.hub import HubError, locate, origin
from evo.job import Job
from evo.mergekit.document import Document
from evo.mergekit.methods import Base
from evo.mergekit.reader import to_recipe
from evo.mergekit.settings import MergekitError
from evo.places import Place, at, describe, listed, read
from search_spaces.recipe import Recipe, Rule, Source

_Opener = Callable[[Mapping[str, Path], Footing, str | None], dict[str, Checkpoint]]
"""Opens folders by name: told which of them adapters rest on, and the dtype to merge into."""


class RecipeError(ValueError):
    """A recipe file cannot be used; the message names the place and the remedy."""


def merge(file: Path, out: Path, *, force: bool = False, common_rows: bool = False) -> Told:
    """Merge what a file says into a new checkpoint.

    Args:
        file: a recipe of ours or mergekit's YAML; folders in it are taken relative to it where they are there,
            else relative to the working directory; other names are ids on the Hub.
        out: the new checkpoint's folder.
        force: replace the checkpoint that is in `out`.
        common_rows: let vocabularies differ by added and padded rows (see evo.vocabulary), as a recipe may say itself.

    Returns:
        what is to be said of it.

    Raises:
        RecipeError: if the file cannot be read, asks for what is not here, or names a checkpoint that is nowhere.
        CheckpointError: if a parent cannot be read, holds NaN or Inf, or does not fit the others.
        ExportError: if `out` is not empty, is or holds one of the parents, or has no room.
    """
    check_target(out, [], force)  # before anything is downloaded
    data, lines = _load(file)
    read_as = _read_mergekit if "merge_method" in data else _read_recipe
    common_rows = common_rows or data.get("vocabulary") == "common"

    def opened(paths: Mapping[str, Path], footing: Footing, dtype: str | None) -> dict[str, Checkpoint]:
        check_target(out, list(paths.values()), force)
        found = open_checkpoints(paths, footing)
        if dtype:
            store_as(list(found.values()), dtype)
        check_compatible(found, common_rows=common_rows)
        return found

    recipe, sources, notes = read_as(file, lines, data, opened)
    notes += [*differing_settings(sources, recipe.interface), *_idle_rules(recipe, sources)]
    told = Told.of(recipe, sources, notes)
    return write_checkpoint(recipe, sources, out, told, lambda lines: merge_card(recipe, out.name, lines), force=force)


def _idle_rules(recipe: Recipe, sources: Mapping[str, Checkpoint]) -> list[str]:
    """What is said of rules that merge nothing."""
    at_work = {id(rule) for rule in recipe.assign(sources[recipe.interface].layout).values()}
    why = "selects no tensor, or none that a rule before it has not"
    return [f"rules.{i}: {why}" for i, rule in enumerate(recipe.rules) if id(rule) not in at_work]


def _load(file: Path) -> tuple[dict[str, Any], dict[Place, int]]:
    try:
        data, lines = read(file)
    except ValueError as error:
        if getattr(error.__cause__, "problem", None) == "but found another document":
            raise RecipeError(
                f"{file}: expected one merge, got several behind each other (---), as mergekit-multi reads "
                "them: give each a file of its own and merge them in turn, with --out as its name says"
            ) from error
        raise RecipeError(str(error)) from error
    if isinstance(data, dict) and "experts" in data and "merge_method" not in data:
        raise RecipeError(
            at(file, lines, ("experts",), "this is a file of mergekit-moe's, which makes experts of dense models: not "
               "here. Merge the result with others of its kind, once mergekit-moe has made it.")
        )  # fmt: skip
    if not isinstance(data, dict) or not ("merge_method" in data or "version" in data):
        raise RecipeError(
            f"{file}: expected a recipe (with the keys version, sources and rules; an export has one) or a file of "
            "mergekit's (with the key merge_method)"
        )
    return data, lines


def _read_recipe(
    file: Path, lines: Mapping[Place, int], data: dict[str, Any], opened: _Opener
) -> tuple[Recipe, dict[str, Checkpoint], list[str]]:
    try:
        recipe = Recipe.from_dict(data)
    except ValidationError as error:
        raise RecipeError(listed(file, lines, (_describe(dict(e)) for e in error.errors()), "recipe")) from None
    except ValueError as error:
        raise RecipeError(at(file, lines, ("version",), str(error))) from None
    for i, rule in enumerate(recipe.rules):
        try:
            Job.of(recipe, rule)
        except ValueError as error:
            raise RecipeError(at(file, lines, ("rules", str(i)), str(error))) from None
    if recipe.chat_template is not None:
        try:
            check_template(recipe.chat_template)
        except ValueError as error:
            raise RecipeError(at(file, lines, ("chat_template",), str(error))) from None
    paths = {name: _located(source.place, file, f"{file}: {name}: ") for name, source in recipe.sources.items()}
    own = {name: source.rests_on for name, source in recipe.sources.items() if source.rests_on is not None}
    sources = opened(paths, Footing(recipe.footing, of=own), recipe.dtype)
    sources[recipe.interface].written_map()  # an adapter has none
    for name, source in recipe.sources.items():
        if source.digest is not None and sources[name].digest() != source.digest:
            raise RecipeError(
                f"{file}: {name}: the content of {paths[name]} is not what the recipe was written for. "
                "Get that checkpoint, or take out its digest to merge what is there."
            )
    named = {name: _source(paths[name], source.digest, source.rests_on) for name, source in recipe.sources.items()}
    return replace(recipe, sources=named), sources, []


def _describe(error: dict[str, Any]) -> tuple[Place, str]:
    """Place of one of pydantic's errors, and what was expected and what came."""
    place = tuple(str(part) for part in error["loc"])
    holder = {"sources": Source, "rules": Rule}.get(place[0], Recipe) if len(place) > 1 else Recipe
    return place, describe(error, [field.name for field in fields(holder)])


def _read_mergekit(
    file: Path, lines: Mapping[Place, int], data: dict[str, Any], opened: _Opener
) -> tuple[Recipe, dict[str, Checkpoint], list[str]]:
    notes: list[str] = []
    try:
        document = Document(data)
        notes = document.notes
        where = {name: at(file, lines, place, "", "mergekit") for name, place in document.places.items()}
        paths = {name: _located(path, file, where[name]) for name, path in document.paths.items()}
        known_as = "the first model" if document.dialect.base is Base.IGNORED else "base_model"
        sources = opened(paths, Footing(document.rests_on, known_as, document.adapters), document.dtype)
        sources[document.interface].written_map()
        named = {name: _source(path, rests_on=document.adapters.get(name)) for name, path in paths.items()}
        recipe = to_recipe(document, sources, named)
        return recipe, sources, notes
    except MergekitError as error:
        message = at(file, lines, error.place, str(error), "mergekit")
        raise RecipeError("\n".join([message, *(f"  {note}" for note in notes)])) from None


def _located(path: str, file: Path, where: str) -> Path:
    """A folder: beside the file if it is there, else from here, else the Hub's."""
    beside = file.resolve().parent
    if Path(path).is_dir() and not (beside / path).is_dir():
        return Path(path).resolve()  # a recipe of it is read from elsewhere
    try:
        return locate(Path(path), beside)
    except HubError as error:
        raise RecipeError(f"{where}{error}") from error


def _source(folder: Path, digest: str | None = None, rests_on: str | None = None) -> Source:
    place, revision = origin(folder)
    return Source(place, digest, revision, rests_on)
