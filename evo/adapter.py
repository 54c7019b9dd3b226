"""PEFT LoRA adapters as checkpoints: a base, and a low-rank difference for some of its tensors.

A folder with adapter_config.json and adapter_model.safetensors. Nothing is made dense (see encodings.low_rank).
Knows LoRA and rsLoRA; other kinds of adapters are refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from evo.checkpoint import Checkpoint, CheckpointError, Cut, read_header, read_json
from evo.copies import tied_heads
from evo.encodings import Entry, TensorHeader
from evo.encodings.low_rank import MAX_RANK, LowRank, fixed_point
from evo.encodings.plain import DTYPES
from search_spaces.layout import Layout, Role, is_by_token

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?$")
_FULL = re.compile(r"\.(modules_to_save(\.default)?|base_layer)\.")  # weights that are saved in full
_MERGE_FIRST = "PeftModel.from_pretrained(BASE, PATH).merge_and_unload().save_pretrained(NEW_PATH)"
_AS_PLAIN = "save_pretrained(NEW_PATH, path_initial_model_for_weight_conversion=INITIAL_PATH)"
_CHANGE_THE_BASE = {
    **dict.fromkeys(("pissa", "olora", "loftq"), f"Merge it into its base first: {_MERGE_FIRST}"),
    **dict.fromkeys(("corda", "lora_ga"), f"Have peft save the trained model as a plain LoRA first: {_AS_PLAIN}"),
}
"""Values of init_lora_weights with which peft takes a first product off the base's weights -> what to do; the first
product of the latter depends on data, and peft does not find it again.
"""
_REFUSED = {
    "use_dora": "DoRA, whose difference is not of low rank",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "an adapter that is active for some tokens only",
    "arrow_config": "an adapter that chooses among others",
    "trainable_token_indices": "rows of single tokens",
    "target_parameters": "differences of parameters that are no layer's weight, such as stacks of experts",
    "lora_bias": "biases of factors",
    "use_bdlora": "factors in blocks",
    "use_qalora": "QA-LoRA, whose factors see sums of inputs",
    "kasa_config": "KaSA, which changes the base",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
"""Settings that make an adapter another thing than a product of two factors."""


@dataclass(frozen=True)
class Footing:
    """Which checkpoints adapters rest on."""

    default: str | None = "base"
    known_as: str = "`base`"
    """What whoever reads an error calls the default."""
    of: Mapping[str, str] = field(default_factory=dict)
    """Adapter -> its own, where it is another."""


def open_checkpoints(paths: Mapping[str, str | Path], footing: Footing | None = None) -> dict[str, Checkpoint]:
    """Open folders by name.

    Args:
        paths: name -> folder.
        footing: which of them adapters rest on.

    Raises:
        CheckpointError: if one cannot be read, an adapter has no base, or what should be an adapter is none.
    """
    footing = footing or Footing()
    found = {name: Checkpoint.open(path) for name, path in paths.items() if not is_adapter(path)}
    for name, path in paths.items():
        own = footing.of.get(name)
        if is_adapter(path) and (own or footing.default) not in found:
            raise CheckpointError(
                f"{name} ({path}) is a LoRA adapter: expected the full checkpoint that it was trained on as "
                f"{own or footing.known_as}"
            )
        if own and name in found:
            raise CheckpointError(f"{name} ({path}): expected a LoRA adapter of {own}, with an {CONFIG_FILE}")
    return {
        name: found.get(name) or Adapter(Path(path), found[footing.of.get(name) or str(footing.default)])
        for name, path in paths.items()
    }


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(path) / CONFIG_FILE).is_file()


class Adapter(Checkpoint):
    """A LoRA adapter on its base. Tensors that it does not touch are the base's."""

    digest_files = (CONFIG_FILE,)
    has_interface = False

    def __init__(self, path: Path, base: Checkpoint) -> None:
        self._base = base
        self._settings = _settings(path)
        if not (path / WEIGHTS_FILE).is_file():
            raise CheckpointError(f"{path}: expected {WEIGHTS_FILE} beside {CONFIG_FILE}")
        headers = read_header(path / WEIGHTS_FILE)
        self._factors: dict[str, dict[str, str]] = {}  # tensor -> side -> name in the file
        self._replaced: dict[str, str] = {}  # tensor -> name in the file
        self._scales: dict[str, float] = {}
        for key in headers:
            self._sort(path, key)
        super().__init__(path, dict.fromkeys(headers, WEIGHTS_FILE), headers)

    @cached_property
    def layout(self) -> Layout:
        """The base's: it has the same tensors, and config.json says which of them are blocks."""
        return self._base.layout

    def config(self) -> dict[str, Any]:
        """The base's config.json."""
        return self._base.config()

    def holders(self, name: str) -> tuple[tuple[Checkpoint, str], ...]:
        """See Checkpoint."""
        replaced = self._replaced.get(name)
        full = self._base.holders(name) if replaced is None else ((self, replaced),)
        return (*full, *((self, f"{name}.{side}") for side in ("left", "right") if name in self._factors))

    def tensor(self, piece: str, cut: Cut | None = None, *, check: bool = True) -> torch.Tensor:
        """See Checkpoint. NAME.left (R, r) and NAME.right (r, C) are the factors of NAME's difference, of which
        the left one is scaled.
        """
        name, _, side = piece.rpartition(".")
        if name not in self._factors:
            return super().tensor(piece, cut, check=check)
        transposed = self._is_transposed(name)
        factor = super().tensor(self._factors[name]["A" if (side == "right") != transposed else "B"]).double()
        if side == "left":
            factor = factor * self._scales[name]
        factor = fixed_point(factor.T if transposed else factor, 1 if side == "left" else 0)
        return (factor if cut is None else factor[cut]).contiguous()

    def header(self, piece: str) -> TensorHeader:
        """See Checkpoint. Factors are made in float32."""
        name, _, side = piece.rpartition(".")
        if name not in self._factors:
            return super().header(piece)
        n_rows, n_columns = self.entries[name].shape
        rank = self.headers[self._factors[name]["A"]].shape[0]
        return TensorHeader("F32", (n_rows, rank) if side == "left" else (rank, n_columns))

    def written_map(self) -> dict[str, str]:
        """An adapter says nothing of how a whole checkpoint is laid out.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"{self.path} is a LoRA adapter, so it cannot be the interface: name a full checkpoint")

    def _sort(self, path: Path, key: str) -> None:
        """Find out which tensor of the base a tensor of the file is about."""
        plain = key.removeprefix("base_model.model.")
        match = _FACTOR.fullmatch(plain)
        name = f"{match['module']}.weight" if match else _FULL.sub(".", plain)
        if tied := self._ties(name, as_a_whole=match is None):
            raise CheckpointError(
                f"{path}: {key} changes {tied} in {self._base.path}. Merge the adapter into its base first: "
                f"{_MERGE_FIRST}"
            )
        if name not in self._base.scored:
            raise CheckpointError(
                f"{path}: {key} belongs to no tensor of the base {self._base.path}. Expected factors lora_A and lora_B "
                "of its weights, or weights that replace its own; is this the base that the adapter was trained on?"
            )
        found, side = (self._factors.setdefault(name, {}), match["side"]) if match else (self._replaced, name)
        if side in found:
            raise CheckpointError(f"{path}: {key} and {found[side]} are about the same weight; expected one of them")
        found[side] = key

    def _ties(self, name: str, *, as_a_whole: bool) -> str | None:
        """What an adapter would untie by changing a tensor: a tied head, or, if it replaces it, its embedding."""
        if not is_by_token(name):  # most are not, and the layout is long
            return None
        heads = {part.tensor for part in self._base.layout.parts if part.role is Role.HEAD}
        if heads - tied_heads(self._base).keys():
            return None
        if name in heads or name not in self._base.scored:
            return "a head that is tied to the embedding"
        return "an embedding that is tied to the head" if as_a_whole else None

    def _find_entries(self) -> dict[str, Entry]:
        return {name: self._entry(name, entry) for name, entry in self._base.entries.items()}

    def _entry(self, name: str, entry: Entry) -> Entry:
        if name in self._replaced:
            header, wanted = self.headers[self._replaced[name]], entry.encoding.output
            if (str(wanted), entry.shape) != (header.dtype, header.shape):
                raise CheckpointError(
                    f"{self.path}: {self._replaced[name]} is {header.dtype} {list(header.shape)}, but the base has "
                    f"{wanted} {list(entry.shape)}"
                )
            entry = replace(entry, encoding=wanted)
        if name not in self._factors:
            return entry
        rank = self._check_factors(name, entry.shape)
        self._scales[name] = self._scale(name.removesuffix(".weight"), rank)
        return replace(entry, encoding=LowRank(entry.encoding))

    def _check_factors(self, name: str, shape: tuple[int, ...]) -> int:
        """Rank of a difference."""
        headers = {side: self.headers[key] for side, key in self._factors[name].items()}
        if odd := [h.dtype for h in headers.values() if h.dtype not in DTYPES]:
            raise CheckpointError(f"{self.path}: expected factors of floats for {name}, got {odd[0]}")
        shapes = {side: header.shape for side, header in headers.items()}
        if len(shape) == 2 and shapes.keys() == {"A", "B"} and len(shapes["A"]) == len(shapes["B"]) == 2:
            rank, n_in = shapes["A"]
            fits = (n_in, shapes["B"][0]) == (shape if self._is_transposed(name) else shape[::-1])
            if fits and rank == shapes["B"][1] and 0 < rank <= MAX_RANK:
                return rank
        raise CheckpointError(
            f"{self.path}: expected lora_A (r, in) and lora_B (out, r) with r up to {MAX_RANK} for {name} "
            f"{list(shape)}, got { ({side: list(s) for side, s in sorted(shapes.items())}) }"
        )

    def _is_transposed(self, name: str) -> bool:
        """Whether the weight is stored (in, out): embeddings, and what the config says so of."""
        return "lora_embedding_" in self._factors[name]["A"] or bool(self._settings.get("fan_in_fan_out"))

    def _scale(self, module: str, rank: int) -> float:
        """Alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732); patterns as peft reads them."""
        expected = _by_pattern(self._settings.get("rank_pattern"), module, self._settings.get("r"))
        if rank != expected:
            raise CheckpointError(f"{self.path}: {module} has rank {rank}, but {CONFIG_FILE} says {expected}")
        alpha = _by_pattern(self._settings.get("alpha_pattern"), module, self._settings.get("lora_alpha"))
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
            raise CheckpointError(f"{self.path / CONFIG_FILE}: expected a finite number lora_alpha, got {alpha!r}")
        return float(alpha / math.sqrt(rank) if self._settings.get("use_rslora") else alpha / rank)


def _settings(path: Path) -> dict[str, Any]:
    settings: dict[str, Any] = read_json(path / CONFIG_FILE)
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise CheckpointError(f"{path / CONFIG_FILE}: expected peft_type LORA, got {json.dumps(kind)}")
    for key, what in _REFUSED.items():
        if settings.get(key):
            raise CheckpointError(
                f"{path / CONFIG_FILE}: {key}: {what}, cannot be merged as an adapter. Merge it into its base first: "
                f"{_MERGE_FIRST}"
            )
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings.get(key) or {}, dict):
            raise CheckpointError(f"{path / CONFIG_FILE}: {key}: expected patterns with numbers, got {settings[key]!r}")
    first = str(settings.get("init_lora_weights")).lower()
    if what_to_do := next((todo for name, todo in _CHANGE_THE_BASE.items() if first.startswith(name)), None):
        raise CheckpointError(
            f"{path / CONFIG_FILE}: init_lora_weights {first!r} changes the base, so the difference is not the product "
            f"alone. {what_to_do}"
        )
    return settings


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that the end of a module's name matches."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise CheckpointError(f"{CONFIG_FILE}: {pattern!r} is no pattern for names: {error}") from None
    return default
