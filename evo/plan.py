"""What a search will need, from its config and the headers of its checkpoints: bytes of memory and disk, seconds.

Nothing is loaded. Pure arithmetic: what the machine has free, its bandwidth and the longest prompt are arguments.
Knows how the default engine keeps its cache (fitness.engines.columns).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from evo.checkpoint import Checkpoint
from evo.config import Config
from evo.encodings.mxfp4 import Mxfp4
from evo.merge import get_method

MIB = 1 << 20
ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
}  # fmt: skip
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PYTHON_BYTES = 505 * MIB
"""Anonymous memory of Python with torch, transformers and the ledger, measured on Linux with torch 2.13 for CPUs."""
CUDA_BYTES = 512 * MIB
"""Context and kernels on a GPU. Not measured."""
MERGE_BYTES = 8 * MIB
"""Blocks of a merge that measures nothing (experiments/benchmarks)."""
SPARE_COLUMNS = 32
"""As in fitness.engines.columns."""
RUN_BYTES, CANDIDATE_BYTES = 2 * MIB, 24 * 1024
"""A run folder with MLflow's store; what a candidate adds to it, besides 16 bytes an answer."""


class PlanError(ValueError):
    """A search does not fit the machine; the message names the setting that would help."""


@dataclass(frozen=True)
class Item:
    """Bytes that something takes somewhere."""

    where: str
    """gpu, host, mapped (pages of files, which the kernel may drop) or disk."""
    what: str
    n_bytes: int


@dataclass(frozen=True)
class Load:
    """What is generated at once, and in all."""

    prompt: int
    """Tokens of the longest prompt."""
    rows: int
    """Answers decoded together."""
    answers: int
    """Answers of a candidate on the search split."""


@dataclass(frozen=True)
class Plan:
    """What a search takes."""

    items: tuple[Item, ...]
    row_bytes: int
    """Of one answer while it is decoded."""
    rows: int
    dtype: str
    device: str

    def total(self, where: str) -> int:
        """Bytes in one place."""
        return sum(item.n_bytes for item in self.items if item.where == where)

    def check(self, free: Mapping[str, int]) -> None:
        """Refuse what does not fit.

        Args:
            free: bytes that are free, by place.

        Raises:
            PlanError: naming the place, what takes most of it and the setting that would help.
        """
        problems = [self._misfit(where, n) for where, n in free.items() if self.total(where) > n]
        if problems:
            raise PlanError("\n".join(problems))

    def _misfit(self, where: str, free: int) -> str:
        need, most = self.total(where), max((i for i in self.items if i.where == where), key=lambda i: i.n_bytes)
        return (
            f"{where}: expected at most {size(free)}, which is free, but the search takes {size(need)}, of it "
            f"{size(most.n_bytes)} for {most.what}. {self._remedy(where, free)}"
        )

    def _remedy(self, where: str, free: int) -> str:
        """The setting that would make it fit, or what else would."""
        if where == "disk":
            return "Free some, or give --out on another disk."
        if where != self.device:
            return "Use a machine with more memory."
        model = sum(item.n_bytes for item in self.items if item.what == MODEL)
        rest = self.total(where) - model - self.rows * self.row_bytes
        if free >= rest + model + self.row_bytes:
            return f"engine.batch_size: {(free - rest - model) // self.row_bytes} or less would fit."
        rest += model // 2
        if self.dtype == "float32" and free >= rest + self.row_bytes // 2:
            rows = min(self.rows, 2 * (free - rest) // self.row_bytes)
            return f"engine.dtype: bfloat16 would fit, with engine.batch_size: {rows} or less."
        if where == "gpu":
            return "engine.device: cpu keeps the checkpoints on disk, mapped, and the model in the host's memory."
        return "No setting would help: use a machine with more memory, or smaller checkpoints."


MODEL, CACHE, EXPANDED = "the resident model", "cached keys and values", "keys and values of one layer, expanded"


def make_plan(config: Config, checkpoints: Mapping[str, Checkpoint], load: Load, *, device: str, dtype: str) -> Plan:
    """Predict bytes.

    Args:
        config: of the search.
        checkpoints: its sources, open; only their headers are read.
        load: what is generated.
        device: where the model lives: "gpu", or "host" for a CPU.
        dtype: of the resident model.
    """
    interface = checkpoints[config.interface_parent]
    model = model_bytes(interface, dtype)
    sizes = interface.config(), load.prompt, config.engine.max_tokens, DTYPE_BYTES[dtype]
    cached, expanded = cache_row_bytes(*sizes), step_row_bytes(*sizes)
    used = {*config.parents, config.space_base, *config.space_donors}
    sources = {name: source_bytes(checkpoints[name]) for name in checkpoints if name in used}
    items = [
        Item(device, MODEL, model),
        Item(device, CACHE, cached * load.rows),
        Item(device, EXPANDED, expanded * load.rows),
        Item(device, "a merge", merge_bytes(config.space.method, interface)),
        Item("host", "Python, torch and transformers", PYTHON_BYTES),
        *(Item("gpu" if device == "gpu" else "mapped", f"the checkpoint {n}", size) for n, size in sources.items()),
        Item("disk", "the run folder", run_bytes(config, load)),
        Item("disk", "an export", export_bytes(interface)),
    ]
    if device == "gpu":
        items += [Item("host", "the model while it is loaded", model), Item("gpu", "CUDA", CUDA_BYTES)]
    return Plan(tuple(item for item in items if item.n_bytes), cached + expanded, load.rows, dtype, device)


def model_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Of the resident model: every scored tensor, in the engine's dtype; a tied head is the embedding."""
    tied = {name for name in checkpoint.scored if name.endswith("lm_head.weight")} if checkpoint.is_tied else set()
    sizes = (math.prod(entry.shape) for name, entry in checkpoint.scored.items() if name not in tied)
    return sum(sizes) * DTYPE_BYTES[dtype]


def source_bytes(checkpoint: Checkpoint) -> int:
    """Of the tensors of its own files that merges read."""
    own = {piece for entry in checkpoint.scored.values() for piece in entry.pieces} & checkpoint.headers.keys()
    return sum(_header_bytes(checkpoint, piece) for piece in own or checkpoint.headers)


def export_bytes(interface: Checkpoint) -> int:
    """Of a merge's tensors as they are stored. MXFP4 becomes bfloat16."""
    return sum(
        2 * math.prod(entry.shape)
        if isinstance(entry.encoding, Mxfp4)
        else sum(_header_bytes(interface, piece) for piece in entry.pieces)
        for entry in interface.entries.values()
    )


def cache_row_bytes(config: Mapping[str, Any], prompt: int, max_tokens: int, item: int) -> int:
    """What an answer takes while it is decoded: cached keys and values, at the most columns that their buffer comes
    to have. Of MLA (DeepSeek) transformers caches the latents, and expands them for one layer at a time.

    Args:
        config: config.json.
        prompt: tokens of the longest prompt.
        max_tokens: of an answer.
        item: bytes of a number.
    """
    config = config.get("text_config") or config
    heads, n_columns = config["num_attention_heads"], columns(prompt, max_tokens)
    if rank := config.get("kv_lora_rank"):
        width = rank + config["qk_rope_head_dim"]
    else:
        head = config.get("head_dim") or config["hidden_size"] // heads
        width = 2 * (config.get("num_key_value_heads") or heads) * head
    return int(n_columns * config["num_hidden_layers"] * width * item)


def step_row_bytes(config: Mapping[str, Any], prompt: int, max_tokens: int, item: int) -> int:
    """What a step takes for an answer besides: latents that MLA expands for one layer. See cache_row_bytes."""
    config = config.get("text_config") or config
    if not config.get("kv_lora_rank"):
        return 0
    nope, rope, value = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    expanded, keys = nope + value, nope + rope
    return int((prompt + max_tokens) * config["num_attention_heads"] * (expanded + keys) * item)


def columns(prompt: int, max_tokens: int) -> int:
    """Of the cache's buffer once the longest answer is in it: it grows by half of what is in use."""
    n = prompt + SPARE_COLUMNS
    while n < prompt + max_tokens:
        n += max(SPARE_COLUMNS, n // 2)
    return n


def merge_bytes(method: str, checkpoint: Checkpoint) -> int:
    """Beyond model and sources. Methods that measure whole parts hold up to two of the largest in float32."""
    if get_method(method).measure is None:
        return MERGE_BYTES
    wholes = (checkpoint.entries[p.tensor].shape[0 if p.row is None else 1 :] for p in checkpoint.layout.parts)
    return 8 * max(map(math.prod, wholes)) + MERGE_BYTES


def run_bytes(config: Config, load: Load) -> int:
    """Of the run folder: as many candidates as the budget says, or 1,000 where it does not."""
    return RUN_BYTES + (config.budget.candidates or 1000) * (CANDIDATE_BYTES + 16 * load.answers)


def candidate_seconds(plan: Plan, load: Load, tokens: tuple[float, float], bandwidth: float) -> tuple[float, float]:
    """Range of seconds that a candidate takes: merge it, then generate.

    A step reads the whole model and a mean answer's keys and values, once at the least; how far above this floor an
    engine stays is not known before it is measured: ten times, and 20 ms a step, at the most.

    Args:
        plan: of the search.
        load: what is generated.
        tokens: range of the mean tokens of an answer.
        bandwidth: bytes a second that a copy reads and writes.
    """
    model = sum(item.n_bytes for item in plan.items if item.what == MODEL)
    sources = sum(item.n_bytes for item in plan.items if item.what.startswith("the checkpoint"))
    merge, batches = (model + sources) / bandwidth, math.ceil(load.answers / load.rows)
    step = (model + plan.row_bytes * load.rows / 2) / bandwidth
    return merge + batches * tokens[0] * step, 3 * merge + batches * tokens[1] * (10 * step + 0.02)


@dataclass(frozen=True)
class Shard:
    """The largest share of a rank, under one layout."""

    layout: str
    model_bytes: int
    source_bytes: int

    def seconds(self, bandwidth: float) -> float:
        """To merge a candidate: every source read and the model written, at bytes a second."""
        return (self.model_bytes + self.source_bytes) / bandwidth


def shards(checkpoints: Iterable[Checkpoint], dtype: str, n_ranks: int) -> list[Shard]:
    """What the fullest of `n_ranks` ranks holds and merges, by layout.

    Tensor-parallel ranks split every matrix evenly and repeat the vectors; pipeline stages are runs of blocks, cut so
    that the fullest is as small as can be; expert-parallel ranks split the routed experts and repeat all else.
    """
    sources = list(checkpoints)
    sizes = [_part_sizes(checkpoint, DTYPE_BYTES[dtype]) for checkpoint in sources]
    first = sizes[0]
    rank_of_block = _stages(first, n_ranks)
    found = []
    for layout in ("tensor", "pipeline", "expert"):
        ranks = [[0, 0] for _ in range(n_ranks)]
        for s, parts in enumerate(sizes):
            for part in parts:
                for rank, share in part.placed(layout, n_ranks, rank_of_block):
                    ranks[rank][0] += 0 if s else math.ceil(part.resident * share)
                    ranks[rank][1] += math.ceil(part.stored * share)
        model, stored = max(ranks, key=sum)
        if layout != "expert" or any(part.expert is not None for part in first):
            found.append(Shard(layout, model, stored))
    return found


@dataclass(frozen=True)
class _Part:
    """Tensors that always go together: of one block, or one expert of it, and of one kind."""

    block: int
    expert: int | None
    is_matrix: bool
    resident: int
    stored: int

    def placed(self, layout: str, n_ranks: int, rank_of_block: Mapping[int, int]) -> list[tuple[int, float]]:
        """Ranks that hold it, and which share of it."""
        if layout == "pipeline":
            return [(rank_of_block[self.block], 1.0)]
        if layout == "tensor":
            return [(rank, 1.0 / n_ranks if self.is_matrix else 1.0) for rank in range(n_ranks)]
        if self.expert is not None:
            return [(self.expert % n_ranks, 1.0)]
        return [(rank, 1.0) for rank in range(n_ranks)]


def _part_sizes(checkpoint: Checkpoint, item: int) -> list[_Part]:
    """Sums over tensors that go together; the embedding comes before the first block, norm and head after the last."""
    sums: dict[tuple[int, int | None, bool], list[int]] = {}
    n_parts: dict[str, int] = {}
    for part in checkpoint.layout.parts:
        n_parts[part.tensor] = n_parts.get(part.tensor, 0) + 1
    for part in checkpoint.layout.parts:
        entry, n = checkpoint.entries[part.tensor], n_parts[part.tensor]
        block = part.block if part.block is not None else -1 if part.role == "embedding" else checkpoint.layout.n_blocks
        total = sums.setdefault((block, part.expert, len(entry.shape) > 1), [0, 0])
        total[0] += math.prod(entry.shape) * item // n
        total[1] += sum(_header_bytes(checkpoint, piece) for piece in entry.pieces if piece in checkpoint.headers) // n
    return [_Part(*key, *total) for key, total in sums.items()]


def _stages(parts: list[_Part], n_ranks: int) -> dict[int, int]:
    """Block -> stage: the cut into runs whose fullest is smallest, by bisection on its size."""
    weight: dict[int, int] = {}
    for part in parts:
        weight[part.block] = weight.get(part.block, 0) + part.resident + part.stored
    low, high = max(weight.values()), sum(weight.values())
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if max(_cut(weight, middle).values()) < n_ranks else (middle + 1, high)
    return _cut(weight, low)


def _cut(weight: Mapping[int, int], limit: int) -> dict[int, int]:
    """Block -> stage, each stage filled up to a limit."""
    stage, filled, found = 0, 0, {}
    for block in sorted(weight):
        if filled + weight[block] > limit:
            stage, filled = stage + 1, 0
        filled += weight[block]
        found[block] = stage
    return found


def _header_bytes(checkpoint: Checkpoint, piece: str) -> int:
    header = checkpoint.headers[piece]
    return math.prod(header.shape) * ITEM_BYTES.get(header.dtype, 1)


def size(n_bytes: float) -> str:
    """A number of bytes for people."""
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"
