"""What mergekit's YAML says, before it is known what the checkpoints hold: models, slices, parameters."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from evo.chat_template import check_template
from evo.errors import did_you_mean
from evo.mergekit.chat_templates import AUTO, CHAT_TEMPLATES
from evo.mergekit.methods import DIALECTS, Base, Dialect
from evo.mergekit.settings import MergekitError, check
from evo.places import Place
from search_spaces.recipe import DTYPES

_KEYS = {
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "modules", "name",
}  # fmt: skip
_OF_INPUTS, _OF_SOURCES = ("model", "parameters"), ("model", "layer_range", "parameters")
_OF_SLICES, _OF_MODULES = ("sources", "base_model", "parameters"), ("models", "slices", "parameters")


@dataclass(frozen=True)
class Parameters:
    """Settings, and where in the file they stand."""

    settings: Mapping[str, Any]
    place: Place


@dataclass(frozen=True)
class Input:
    """A model in a slice."""

    name: str
    """What our recipe calls it."""
    own: Parameters
    place: Place


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the result, merged from the same layers of its inputs."""

    inputs: tuple[Input, ...]
    layers: tuple[int, int] | None
    """From, to; None for all."""
    shared: Parameters
    place: Place


class Document:
    """A file of mergekit's, checked for everything that needs no checkpoint.

    Raises:
        MergekitError: with the place of what cannot be said here.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.notes: list[str] = []
        """What the file says and is not used."""
        self.paths: dict[str, str] = {}
        """Name -> model as the file has it."""
        self.places: dict[str, Place] = {}
        """Name -> where the file names it first."""
        self.adapters: dict[str, str] = {}
        """Name of an adapter -> that of the model in front of its +."""
        self.tokenizer: str | None = None
        """The key that says whose tokenizer the result has."""
        self.method: str = _known_method(data["merge_method"])
        self.dialect: Dialect = DIALECTS[self.method]
        self._note_unknown(data, _KEYS, ())
        holder, self._inside = self._module(data)
        self.base_model = self._base_model(data, holder)
        self.base = None if self.dialect.base is Base.IGNORED else self.base_model
        scopes = {self._inside: holder, (): data}  # the same, unless there is a module
        self.shared = tuple(self._parameters(scope, place) for place, scope in scopes.items())
        """What holds for all slices, the nearest first."""
        self.slices = tuple(self._slices(holder))
        self.origin = self.base or self.slices[0].inputs[0].name
        self.interface = self._interface(data)
        self.dtype = self._dtype(data)
        self.chat_template = self._chat_template(data)
        """A text, AUTO, or None for the interface's."""
        self._check_slices()
        self._check_parameters()

    @property
    def rests_on(self) -> str | None:
        """What adapters among the models were trained on: our recipe's base, unless the file has another."""
        return self.origin if self.base_model in (None, self.origin) else None

    def _module(self, data: Mapping[str, Any]) -> tuple[Mapping[str, Any], Place]:
        """What has the models or slices, and where it stands: the file, or its one module (as mergekit writes it)."""
        if not (modules := data.get("modules")):
            return data, ()
        place: Place = ("modules", "default")
        if given := [key for key in ("models", "slices") if data.get(key)]:
            raise MergekitError(
                (), f"expected one of models, slices and modules, got modules and {' and '.join(given)}"
            )
        if not isinstance(modules, dict) or list(modules) != ["default"] or not isinstance(modules["default"], dict):
            raise MergekitError(("modules",), "expected the module 'default' alone, with models or slices: merges of "
                                "several modules are not here")  # fmt: skip
        self._note_unknown(modules["default"], _OF_MODULES, place)
        return modules["default"], place

    def _base_model(self, data: Mapping[str, Any], holder: Mapping[str, Any]) -> str | None:
        """The file's, or what all slices have as theirs."""
        if (base := data.get("base_model")) is not None:
            return self._name(base, ("base_model",))
        slices = holder.get("slices")
        found = [s.get("base_model") for s in slices if isinstance(s, dict)] if isinstance(slices, list) else []
        if found and found[0] is not None and all(model == found[0] for model in found):
            return self._name(found[0], (*self._inside, "slices", "0", "base_model"))
        return None

    def _note_unknown(self, data: Mapping[str, Any], known: Collection[str], place: Place) -> None:
        """What is said of keys that nobody reads; those that begin with x- hold anchors."""
        for key in data:
            if key not in known and not key.startswith("x-"):
                belongs = key in self.dialect.shared or key in self.dialect.own
                why = ", as mergekit does: it belongs under parameters" if belongs else did_you_mean(key, known, 0.75)
                self.notes.append(f"{'.'.join((*place, key))}: ignored{why}")

    def _name(self, model: Any, place: Place) -> str:
        """What our recipe calls a model; of MODEL+ADAPTER the adapter, which rests on the model."""
        parts = (_as_text(model) or "").split("+")
        if not 1 <= len(parts) <= 2 or not all(part.strip() for part in parts):
            raise MergekitError(place, f"expected a folder or the name of a model, or MODEL+ADAPTER, got {model!r}")
        name = self._called(parts[0], None, place)
        return self._called(parts[1], name, place) if parts[1:] else name

    def _called(self, model: str, rests_on: str | None, place: Place) -> str:
        for name, path in self.paths.items():
            if (path, self.adapters.get(name)) == (model, rests_on):
                return name
        stem = re.sub(r"\W", "_", model.rstrip("/").rpartition("/")[2].partition("@")[0]).strip("_") or "model"
        names = (stem if i == 1 else f"{stem}_{i}" for i in range(1, len(self.paths) + 3))
        taken = {*self.paths, "base"} if self.paths else set()  # whoever is called so is what adapters rest on
        name = next(name for name in names if name not in taken)
        self.paths[name], self.places[name] = model, place
        if rests_on is not None:
            self.adapters[name] = rests_on
        return name

    def _parameters(self, data: Mapping[str, Any], place: Place) -> Parameters:
        place = (*place, "parameters")
        settings = data.get("parameters") or {}
        if not isinstance(settings, dict):
            raise MergekitError(place, f"expected names and values, got {settings!r}")
        return Parameters(settings, place)

    def _slices(self, data: Mapping[str, Any]) -> Iterator[Slice]:
        given = [key for key in ("models", "slices") if data.get(key)]
        if len(given) != 1:
            found = " and ".join(given) or "neither"
            raise MergekitError(self._inside, f"expected one of models and slices, got {found}")
        entries, place = data[given[0]], (*self._inside, given[0])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            what = "- model: FOLDER" if given == ["models"] else "- sources: [...]"
            raise MergekitError(place, f"expected a list, each entry of which is like {what}")
        if given == ["models"]:
            inputs = [self._input(entry, (*place, str(i)), _OF_INPUTS) for i, entry in enumerate(entries)]
            if self.base_model is not None and self.base_model not in [i.name for i in inputs]:
                inputs.append(Input(self.base_model, Parameters({}, ("base_model", "parameters")), ("base_model",)))
            yield Slice(tuple(inputs), None, Parameters({}, ()), place)
            return
        for k, entry in enumerate(entries):
            yield self._slice(entry, (*place, str(k)))

    def _slice(self, entry: Mapping[str, Any], place: Place) -> Slice:
        sources = entry.get("sources")
        if not isinstance(sources, list) or not sources or not all(isinstance(s, dict) for s in sources):
            raise MergekitError(place, "expected sources, a list of models with a layer_range")
        self._note_unknown(entry, _OF_SLICES, place)
        if "base_model" in entry and self._name(entry["base_model"], (*place, "base_model")) != self.base_model:
            raise MergekitError((*place, "base_model"), "a base of a slice's own is not here; the nearest is one "
                                "file for each base_model")  # fmt: skip
        ranges = [source.get("layer_range") for source in sources]
        for i, layers in enumerate(ranges):
            if not isinstance(layers, list) or len(layers) != 2 or not all(isinstance(end, int) for end in layers):
                where = (*place, "sources", str(i), "layer_range")
                raise MergekitError(where, f"expected [FROM, TO], two whole numbers, got {layers!r}")
            if layers != ranges[0]:
                where = (*place, "sources", str(i), "layer_range")
                raise MergekitError(where, f"layers {layers} would be merged with layers {ranges[0]} of another model;"
                                    " here a layer is merged with the same layer of the others only")  # fmt: skip
        inputs = [self._input(source, (*place, "sources", str(i)), _OF_SOURCES) for i, source in enumerate(sources)]
        return Slice(tuple(inputs), tuple(ranges[0]), self._parameters(entry, place), place)

    def _input(self, entry: Mapping[str, Any], place: Place, known: Collection[str]) -> Input:
        if "model" not in entry:
            raise MergekitError(place, "the key 'model' is missing")
        self._note_unknown(entry, known, place)
        return Input(self._name(entry["model"], (*place, "model")), self._parameters(entry, place), place)

    def _check_slices(self) -> None:
        end = 0
        for s in self.slices:
            names = [i.name for i in s.inputs]
            if twice := [i for i in s.inputs if names.count(i.name) > 1]:
                raise MergekitError(twice[-1].place, f"{self.paths[twice[-1].name]} is named twice")
            if self.dialect.base is Base.REQUIRED and self.base is None:
                raise MergekitError(("merge_method",), f"{self.method} needs a base_model")
            if self.base is not None and self.base not in names:
                raise MergekitError(s.place, "expected the base_model among the sources of the slice")
            n_donors = len(names) - (self.base is not None)
            for n, (low, high), what in (
                (len(names), self.dialect.n_inputs, "models"),
                (n_donors, self.dialect.n_donors, "models besides the base_model"),
            ):
                if not low <= n <= high:
                    wanted = low if low == high else f"at least {low}" if n < low else f"at most {high}"
                    listed = ", ".join(self.paths[name] for name in names)
                    raise MergekitError(s.place, f"{self.method}: expected {wanted} {what}, got {n} ({listed})")
            if s.layers is not None and s.layers[0] != end:
                raise MergekitError(
                    (*s.inputs[0].place, "layer_range"),
                    f"layers {list(s.layers)} would come to stand at {end}: stacking and reordering of layers is not "
                    "here. The nearest is a merge in which every layer keeps its place; mergekit stacks.",
                )
            end = s.layers[1] if s.layers else end

    def _check_parameters(self) -> None:
        known = {**self.dialect.shared, **self.dialect.own}
        inputs, slices = [i for s in self.slices for i in s.inputs], [s.shared for s in self.slices]
        scopes: list[tuple[Parameters, Mapping[str, Any]]] = [(p, known) for p in (*self.shared, *slices)]
        scopes += [(i.own, {} if i.name == self.base else self.dialect.own) for i in inputs]
        for parameters, here in scopes:
            for name, setting in parameters.settings.items():
                where = (*parameters.place, name)
                if name in here or name == "int8_mask":
                    check(setting, where, truth=isinstance(here.get(name, False), bool))
                if name not in here:
                    self.notes.append(f"{'.'.join(where)}: ignored{self._why_ignored(name, known)}")

    def _why_ignored(self, name: str, known: Collection[str]) -> str:
        if name == "int8_mask":
            return ": about memory only"
        if name in self.dialect.own:
            return ", as mergekit does: the base_model has none"
        if name in known:
            return ", as mergekit does: it belongs to all models"
        return f": no parameter of {self.method}{did_you_mean(name, known)}"

    def _interface(self, data: Mapping[str, Any]) -> str:
        default = self._whole(self.base_model or self.slices[0].inputs[0].name)
        source, place = data.get("tokenizer_source"), ("tokenizer_source",)
        if (tokenizer := data.get("tokenizer")) is not None:
            place = ("tokenizer",)
            if source is not None:
                raise MergekitError(place, "expected this or tokenizer_source, got both")
            if not isinstance(tokenizer, dict) or not set(tokenizer) <= {"source"}:
                raise MergekitError(place, "only {source: MODEL} is read here, which is tokenizer_source: MODEL; "
                                    "vocabularies must be equal already")  # fmt: skip
            source = tokenizer.get("source")
        self.tokenizer = None if source is None else place[0]
        if source == "union":
            self.notes.append(f"{place[0]}: union is read as base: the same for equal vocabularies, but for padding")
        if source in (None, "base", "union"):
            return default
        return self._whole(self._name(source.removeprefix("model:") if isinstance(source, str) else source, place))

    def _chat_template(self, data: Mapping[str, Any]) -> str | None:
        if not (said := data.get("chat_template")):
            return None
        if (text := str(said)) == AUTO:
            return AUTO
        if text in CHAT_TEMPLATES:
            return CHAT_TEMPLATES[text]
        try:
            check_template(text)
        except ValueError as error:
            known = ", ".join((AUTO, *CHAT_TEMPLATES))
            raise MergekitError(("chat_template",), f"expected {known} or a template's text: {error}") from None
        return text

    def _whole(self, name: str) -> str:
        """An adapter's model: it has no tokenizer of its own."""
        return self.adapters.get(name, name)

    def _dtype(self, data: Mapping[str, Any]) -> str | None:
        """What is asked for of the files. Merging is in float32 whatever is asked."""
        for key in ("out_dtype", "dtype"):
            if (name := data.get(key)) is not None:
                if (plain := str(name).removeprefix("torch.")) not in DTYPES:
                    raise MergekitError((key,), f"expected one of {', '.join(DTYPES)}, got {name!r}")
                return plain
        return None


def _as_text(model: Any) -> str | None:
    """A model as "FOLDER", "ORG/NAME@REVISION" or "MODEL+ADAPTER"; mergekit writes mappings too. None if it is none."""
    if isinstance(model, dict) and "model" in model and set(model) <= {"model", "lora"}:
        parts = [_as_text(model[key]) for key in ("model", "lora") if model.get(key) is not None]
        return None if None in parts else "+".join(map(str, parts))
    if isinstance(model, dict) and set(model) <= {"path", "revision"} and "path" in model:
        return "@".join(str(part) for part in (model["path"], model.get("revision")) if part)
    return model if isinstance(model, str) else None


def _known_method(name: Any) -> str:
    if isinstance(name, str) and name in DIALECTS:
        return name
    hint = "; the nearest is ram" if name == "ramplus_tl" else did_you_mean(str(name).lower(), DIALECTS)
    raise MergekitError(("merge_method",), f"{name!r} is not here: expected one of {', '.join(DIALECTS)}{hint}")
