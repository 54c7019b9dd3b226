"""Reads checkpoint folders in the Hugging Face layout: lazily, and with every tensor accounted for.

Knows files and headers; not what a tensor is for (that is search_spaces.layout).
"""

from __future__ import annotations

import hashlib
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from evo.encodings import EncodingError, Entry, Stored, TensorHeader, find_entries
from evo.encodings.flaws import find_flaw
from evo.encodings.foreign import advice, refuse
from search_spaces.layout import Layout, parse_layout

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
INTERFACE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "tiktoken.model", "tekken.json", "spiece.model",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "*.tiktoken",  # of tokenizers that are code and name a file of their own, as in Hunyuan's and the first Qwen's
)  # fmt: skip
"""Files besides the weights that decide what a checkpoint says; a child gets its interface parent's."""
Cut = tuple[slice | int, ...]
"""An index of a tensor: for its leading dimensions, what to take of each."""
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself


class CheckpointError(ValueError):
    """A checkpoint folder cannot be read, or does not fit its siblings."""


class Checkpoint:
    """One checkpoint folder. Opening it reads headers only; tensors are read one by one, when asked for."""

    digest_files: tuple[str, ...] = INTERFACE_FILES
    has_interface = True
    """Whether the interface files in its folder are its own."""
    """Files besides the weights that count as its content."""

    def __init__(self, path: Path, weight_map: dict[str, str], headers: dict[str, TensorHeader]) -> None:
        self.path = path
        self.weight_map = weight_map
        """Tensor name -> file name, in the order of the index."""
        self.headers = headers
        """Of all tensors in the files: a tensor of the model may be stored as several, see `entries`."""
        self._handles: dict[str, Any] = {}
        self._finite: set[str] = set()  # pieces that have been looked through
        self.entries: dict[str, Entry] = self._find_entries()
        """Tensor of the model -> how it is stored, in the order of the index."""

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a folder that holds `model.safetensors` or an index with its shards.

        Raises:
            CheckpointError: if a file is missing, damaged or outside the folder, or if the index and
                the shards disagree.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"no checkpoint at {path}: expected a folder with safetensors files")
        if (path / INDEX_FILE).is_file() and (path / SINGLE_FILE).is_file():
            raise CheckpointError(
                f"{path} holds both {SINGLE_FILE}, which transformers would read, and {INDEX_FILE} with its shards: "
                "expected one of them. Move the other away."
            )
        if (path / INDEX_FILE).is_file():
            weight_map = _read_index(path)
            return cls(path, weight_map, _headers_of(path, weight_map))
        if (path / SINGLE_FILE).is_file():
            headers = read_header(path / SINGLE_FILE)
            return cls(path, dict.fromkeys(headers, SINGLE_FILE), headers)
        raise CheckpointError(_nothing_to_read(path))

    def _find_entries(self) -> dict[str, Entry]:
        try:
            refuse(self.headers, self.quantization)
            return find_entries(self.headers, self.quantization)
        except EncodingError as error:
            raise CheckpointError(f"{self.path}: {error}") from None

    @cached_property
    def layout(self) -> Layout:
        """Where each tensor sits.

        Raises:
            UnknownTensorError: if a tensor's role cannot be told.
            CheckpointError: if a tensor that is to be merged holds no floats.
        """
        shapes = {name: entry.shape for name, entry in self.entries.items()}
        layout = parse_layout(shapes, _settings(self._config_or_nothing()).get("num_hidden_layers"))
        merged = self.entries.keys() - set(layout.unscored)
        if odd := [name for name in merged if not self.entries[name].encoding.is_float]:
            raise CheckpointError(
                f"{self.path}: {len(odd)} tensor(s) hold no numbers that can be merged: "
                + ", ".join(f"{name} ({self.entries[name].encoding})" for name in sorted(odd)[:5])
            )
        return layout

    @cached_property
    def scored(self) -> dict[str, Entry]:
        """The entries that a merge is about: all that generating text uses."""
        unscored = set(self.layout.unscored)
        return {name: entry for name, entry in self.entries.items() if name not in unscored}

    def tensor(self, piece: str, cut: Cut | None = None, *, check: bool = True) -> torch.Tensor:
        """Read one tensor of the files, or no more of it than a cut, to the CPU, as it is.

        Args:
            piece: its name.
            cut: what of it; None for all.
            check: whether to look for NaN and Inf, if that has not been done.

        Raises:
            CheckpointError: if it cannot be read, or holds one.
        """
        file = self.weight_map[piece]
        try:
            if file not in self._handles:
                self._handles[file] = safe_open(self.path / file, framework="pt")
            handle = self._handles[file]
            tensor: torch.Tensor = (
                handle.get_tensor(piece) if cut is None else handle.get_slice(piece)[cut].contiguous()
            )
        except (SafetensorError, OSError, AttributeError, KeyError) as error:  # the latter: a dtype torch has not
            raise CheckpointError(f"{self.path / file}: tensor {piece} cannot be read: {error}") from error
        if check and piece not in self._finite:
            if found := find_flaw(piece, tensor):
                raise CheckpointError(
                    f"{self.path / file}: tensor {piece} holds {found}; "
                    "expected finite numbers only. Get this checkpoint anew, or leave it out."
                )
            if cut is None:
                self._finite.add(piece)
        return tensor

    def holders(self, name: str) -> tuple[tuple[Checkpoint, str], ...]:
        """Where the pieces of a tensor of the model are: checkpoints and what they call them."""
        return tuple((self, piece) for piece in self.entries[name].pieces)

    def stored(self, name: str) -> Stored:
        """Read one tensor of the model to the CPU, in the bits of the files."""
        pieces = (holder.tensor(piece) for holder, piece in self.holders(name))
        return Stored(self.entries[name].encoding, tuple(pieces))

    def header(self, piece: str) -> TensorHeader:
        """Dtype and shape of what `tensor` gives."""
        return self.headers[piece]

    def written_map(self) -> dict[str, str]:
        """Name -> file of the tensors of a merge that is laid out in files as this checkpoint is."""
        pieces = {e.name + suffix: e.pieces[0] for e in self.entries.values() for suffix in e.encoding.output.suffixes}
        return {piece: self.weight_map.get(piece) or self.weight_map[first] for piece, first in pieces.items()}

    def written_headers(self) -> dict[str, TensorHeader]:
        """Of the same tensors."""
        headers: dict[str, TensorHeader] = {}
        for entry in self.entries.values():
            output = entry.encoding.output
            if output == entry.encoding:
                headers |= {piece: self.headers[piece] for piece in entry.pieces}
            else:  # a plain one
                headers[entry.name] = TensorHeader(str(output), entry.shape)
        return headers

    @property
    def quantization(self) -> dict[str, Any]:
        """What config.json says of how weights are stored."""
        return self._config_or_nothing().get("quantization_config") or {}

    def _config_or_nothing(self) -> dict[str, Any]:
        return self.config() if (self.path / "config.json").is_file() else {}

    def config(self) -> dict[str, Any]:
        """The parsed config.json.

        Raises:
            CheckpointError: if it is missing or damaged, or a section or a number in it is none.
        """
        data = read_json(self.path / "config.json")
        if not isinstance(data, dict):
            raise CheckpointError(f"{self.path / 'config.json'}: expected an object, got {type(data).__name__}")
        for key in ("quantization_config", "text_config"):
            if data.get(key) is None:
                data.pop(key, None)
            elif not isinstance(data[key], dict):
                raise CheckpointError(f"{self.path / 'config.json'}: {key}: expected an object, got {data[key]!r}")
        for where, section in (("", data), ("text_config.", data.get("text_config", {}))):
            if not isinstance(wrong := section.get("num_hidden_layers"), int | None):
                key = f"{where}num_hidden_layers"
                raise CheckpointError(f"{self.path / 'config.json'}: {key}: expected a number, got {wrong!r}")
        return data

    def settings(self) -> dict[str, Any]:
        """What config.json says of the model as a whole, and of its text where that has a config of its own."""
        return _settings(self.config())

    @property
    def is_tied(self) -> bool | None:
        """Whether head and embedding are one tensor (config.json's tie_word_embeddings); None where it is not said."""
        said = self.settings().get("tie_word_embeddings")
        return None if said is None else bool(said)

    def weight_files(self) -> list[Path]:
        """The files that its tensors are in."""
        return [self.path / name for name in sorted(set(self.weight_map.values()))]

    def companions(self) -> list[Path]:
        """Files besides the weights that a child gets: the interface files, and code where one of them names some
        (`auto_map`): whoever trusts it has it loaded from the child's folder. It is never run here.
        """
        found = self._files(INTERFACE_FILES)
        if any(b'"auto_map"' in path.read_bytes() for path in found if path.name.endswith("config.json")):
            found += self._files(("*.py",))
        return found

    def digest(self) -> str:
        """SHA-256 (hex) over the content of the weights and of the interface files. Reads every byte."""
        names = sorted({*self.weight_map.values(), *(file.name for file in self._files(self.digest_files))})
        with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter, so shards go in parallel
            digests = list(pool.map(lambda name: _file_digest(self.path / name), names))
        lines = "\n".join(f"{name} {digest}" for name, digest in zip(names, digests, strict=True))
        return hashlib.sha256(lines.encode()).hexdigest()

    def _files(self, patterns: tuple[str, ...]) -> list[Path]:
        """Those that are there, in the order of the patterns."""
        return [file for pattern in patterns for file in sorted(self.path.glob(pattern)) if file.is_file()]


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    return {**config.get("text_config", {}), **config}


def read_vocabulary(path: Path) -> dict[str, int] | None:
    """Token -> id of a fast tokenizer's file, or None where there is none.

    Raises:
        CheckpointError: if it is no such file.
    """
    if not (path / "tokenizer.json").is_file():
        return None
    data = read_json(path / "tokenizer.json")
    try:
        vocabulary = data.get("model", {}).get("vocab", {})
        if isinstance(vocabulary, list):  # unigram models list [token, score]
            vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
        found = {**vocabulary, **{token["content"]: token["id"] for token in data.get("added_tokens", [])}}
        if not all(isinstance(index, int) for index in found.values()):
            raise TypeError
        return found
    except (AttributeError, TypeError, KeyError, IndexError):
        raise CheckpointError(f"{path / 'tokenizer.json'} is not the file of a fast tokenizer") from None


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    try:
        return _parse_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def _parse_json(text: bytes) -> Any:
    """JSON whose objects name each key once: a tensor listed twice has two truths."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"{twice!r} is listed twice")
        return found

    return json.loads(text, object_pairs_hook=unique)


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path / INDEX_FILE)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX_FILE}: expected a non-empty object 'weight_map'")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file.isprintable() and Path(file).name == file
        if not plain or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path / INDEX_FILE}: tensor {name} is said to be in {file!r}; "
                "expected the plain name of a .safetensors file in the same folder"
            )
    return weight_map


def _headers_of(path: Path, weight_map: dict[str, str]) -> dict[str, TensorHeader]:
    """Headers in the order of the weight map; every tensor of every shard must be in it."""
    by_file = {file: read_header(path / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in by_file[file]:
            raise CheckpointError(f"{path / file}: tensor {name} is missing, though {INDEX_FILE} says it is there")
    for file, headers in by_file.items():
        if twice := [name for name in headers if weight_map.get(name, file) != file]:
            raise CheckpointError(f"{path}: tensor {twice[0]} is both in {file} and in {weight_map[twice[0]]}")
        if strays := [name for name in headers if name not in weight_map]:
            raise CheckpointError(
                f"{path / file}: holds {len(strays)} tensor(s) that {INDEX_FILE} does not place there: "
                + ", ".join(strays[:5])
            )
    return {name: by_file[file][name] for name, file in weight_map.items()}


def read_header(file: Path) -> dict[str, TensorHeader]:
    """Tensor headers of a safetensors file, after the library has checked the file as a whole: that tensors lie
    inside it, fill it and do not overlap.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt"):
            pass
        with open(file, "rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            data = _parse_json(stream.read(min(size, _MAX_HEADER_BYTES)))
        return {
            name: TensorHeader(entry["dtype"], tuple(entry["shape"]))
            for name, entry in data.items()
            if name != "__metadata__"
        }
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except (SafetensorError, OSError, struct.error, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}") from error


def _nothing_to_read(path: Path) -> str:
    if pickles := sorted(p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth"}):
        return (
            f"{path} holds {pickles[0]}, a pickle, which is never loaded here. Convert it first: "
            "AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(NEW_PATH)"
        )
    if ggufs := sorted(p.name for p in path.glob("*.gguf")):
        return f"{path} holds {ggufs[0]}, which is not read. {advice('gguf')}"
    return f"{path}: expected {SINGLE_FILE} or {INDEX_FILE} in this folder"


def _file_digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
