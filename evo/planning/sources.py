"""Bytes of what a search merges, by place: where the materializer would keep it (evo.holdings, evo.residency)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from evo.checkpoint import Checkpoint
from evo.config import Config
from evo.deltas import Compression, Deltas, parse
from evo.holdings import Holding, holdings, kept_bytes, matrix_of, most_at_once, part_headers
from evo.parallel import own_parts
from evo.planning.merges import merge_bytes
from evo.residency import Residency, choose
from evo.vocabulary import common_rows


@dataclass(frozen=True)
class Item:
    """Bytes that something takes somewhere."""

    where: str
    """gpu, host, mapped (pages of files, which the kernel may drop) or disk."""
    what: str
    n_bytes: int


class Sources:
    """What is merged, counted once for plans with several settings.

    Args:
        config: of the search.
        checkpoints: its sources, open.
    """

    def __init__(self, config: Config, checkpoints: Mapping[str, Checkpoint]) -> None:
        self.interface = checkpoints[config.interface_parent]
        self._config, self._checkpoints = config, checkpoints
        self._used = used_sources(config, checkpoints)
        self._parts = own_parts(self.interface)
        self._common = common_rows(checkpoints)
        self._held: dict[tuple[str, int], dict[str, Holding]] = {}
        self._merging: dict[tuple[str, str], int] = {}

    @property
    def n_bytes(self) -> int:
        """That a merge reads, if nothing is compressed."""
        return sum(holding.kept for holding in self._holdings("exact", self._used).values())

    def choose(self, residency: str, deltas: str, device: str, free: Mapping[str, int]) -> Residency:
        """Where the materializer would keep them.

        Args:
            residency: of the config.
            deltas: of the config.
            device: "gpu" or "host".
            free: bytes that are free beside the model, by place.

        Raises:
            ValueError: if it cannot be had.
        """
        found = self._holdings(deltas, self._checkpoints).values()
        where = torch.device("cuda" if device == "gpu" else "cpu")
        return choose(
            Residency(residency), where, *kept_bytes(found),
            free=lambda d: free.get("gpu" if d.type == "cuda" else "host", 0),
        )  # fmt: skip

    def merge_bytes(self, dtype: str, device: str) -> int:
        """That a merge takes for a while, beside the model and what of the sources is there.

        Args:
            dtype: of the model.
            device: "gpu" or "host".
        """
        if (dtype, device) not in self._merging:
            method = self._config.space.method
            self._merging[dtype, device] = merge_bytes(method, self.interface, self._used, self._common, dtype, device)
        return self._merging[dtype, device]

    def items(self, residency: Residency, deltas: str, device: str) -> list[Item]:
        """By place: what is kept, and what a merge takes for a while.

        Args:
            residency: not AUTO.
            deltas: of the config.
            device: "gpu" or "host".
        """
        found, place = self.kept(residency, deltas, device), self.place(residency, device)
        if device == "gpu" and (place != "gpu" or deltas != "exact"):
            found.append(Item("gpu", "what is merged now, copied there", self._arriving[residency is Residency.PINNED]))
        if compression := parse(deltas):
            stay = residency is Residency.DEVICE or device == "host"
            beside = self._compressing(compression, base=place == device, deltas=stay)
            found.append(Item(device, "compressing, and merging what is compressed", beside))
        return found

    def place(self, residency: Residency, device: str) -> str:
        """Where sources are between candidates: gpu, host or mapped. See items."""
        if self._config.engine.kind == "vllm" and device == "gpu":  # its workers keep nothing but differences
            return "mapped"
        return {Residency.DEVICE: device, Residency.PINNED: "host", Residency.DISK: "mapped"}[residency]

    def kept(self, residency: Residency, deltas: str, device: str) -> list[Item]:
        """What stays for the next candidate. See items."""
        found, place = [], self.place(residency, device)
        for name, held in self._holdings(deltas, self._used).items():
            if held.deltas is None:
                stays = held.pinned if place == "host" and residency is Residency.PINNED else held.stored
                found.append(Item(place, f"the checkpoint {name}", stays))
                if residency is not Residency.PINNED and (place == device or (place, device) == ("mapped", "host")):
                    found.append(Item(device, f"factors of the adapter {name}", held.made))
            else:
                where = device if residency is Residency.DEVICE else "host"
                found.append(Item(where, f"differences of {name} as {deltas}", held.deltas))
                found.append(Item("mapped", f"the checkpoint {name}, for exact scores", held.stored))
        return found

    def _compressing(self, compression: Compression, *, base: bool, deltas: bool) -> int:
        """Bytes that compressing takes beside all that is kept in the end: much of that is not there yet while a large
        embedding is compressed, which mostly comes first.

        Args:
            compression: how.
            base: whether the base is kept where differences are compressed.
            deltas: whether these are.
        """
        source, made, n_donors = self._checkpoints[self._config.space_base], Deltas(compression), len(self._used) - 1
        later = most = 0
        for part in reversed(self._parts):
            shape = matrix_of(self.interface, part)
            most = max(most, compression.scratch_bytes(shape) - later)
            later += base * sum(header.n_bytes for header in part_headers(source, part))
            later += deltas * n_donors * made.n_bytes([shape])
        return most

    @cached_property
    def _arriving(self) -> tuple[int, int]:
        """Bytes of one part of all sources, and of two in turn, at most."""
        return most_at_once(self._used, self._parts, 1), most_at_once(self._used, self._parts, 2)

    def _holdings(self, deltas: str, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Holding]:
        key = deltas, len(checkpoints)
        if key not in self._held:
            compression = parse(deltas)
            self._held[key] = holdings(
                checkpoints, self._parts, Deltas(compression) if compression else None, self._config.space_base,
                self._common,
            )  # fmt: skip
        return self._held[key]


def used_sources(config: Config, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """Those that a search reads: not an ancestor that its method does not start from."""
    used = {*config.parents, config.space_base, *config.space_donors}
    return {name: checkpoint for name, checkpoint in checkpoints.items() if name in used}
