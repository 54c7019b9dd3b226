"""Where each tensor of a checkpoint sits: its block, its expert and its role.

Knows names and shapes only: no torch, no files, no values. The unit is a *part*: a whole tensor, or,
where a checkpoint packs all experts of a block into one tensor, one expert's slice of it. Spaces and
recipes speak of parts, so that per-expert and packed checkpoints are addressed alike.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a tensor does in a transformer."""

    ATTENTION = "attention"
    """Projections of an attention layer, or of what mixes tokens in its place (linear attention, Mamba, short
    convolutions), with the norms, biases and sinks inside it."""
    FFN = "ffn"
    """A dense feed-forward layer."""
    SHARED_EXPERT = "shared_expert"
    """The expert of a MoE block that sees every token."""
    ROUTED_EXPERT = "routed_expert"
    """One of the experts of a MoE block that the router picks from."""
    ROUTER = "router"
    """Scores experts: the gate, its bias, and the gate of a shared expert."""
    NORM = "norm"
    """A norm between layers, or the last one; scales of residual streams."""
    EMBEDDING = "embedding"
    """Token (and position) embeddings, those of each layer included."""
    HEAD = "head"
    """The output projection to the vocabulary."""


_OF_TOKENS = "embed_tokens|embed_in|wte|word_embeddings|tok_embeddings|embeddings"
_OUTPUT = r"^(model\.)?output\.weight$"
# Tried in this order; the first match wins. Attention comes before norm, so that q_norm and
# q_a_layernorm move with the projections they were trained with.
_ROLE_PATTERNS: tuple[tuple[Role, str], ...] = (
    (Role.HEAD, rf"(^|\.)(lm_head|embed_out|project_out)\.|{_OUTPUT}"),
    (Role.EMBEDDING, rf"(^|\.)({_OF_TOKENS}|wpe)\."),
    (Role.EMBEDDING, r"(^|\.)(embed_positions|embed_tokens_per_layer|per_layer_model_projection|project_in)\."),
    (Role.EMBEDDING, r"(^|\.)altup_(un)?(embed_)?projections\."),
    (Role.ATTENTION, r"\.(self_attn|linear_attn|cross_attn|attn|attention|self_attention|mamba|conv)\."),
    (Role.ATTENTION, r"\.cross_attn_(attn|mlp)_gate$"),
    (Role.ATTENTION, r"\.mixer\.(?!(up_proj|down_proj|gate|experts|shared_experts)\.)"),
    (Role.ROUTER, r"\.(mlp|block_sparse_moe|feed_forward|ffn|moe|mixer)\.(gate|router)\.|\.shared_expert_gate\."),
    (Role.ROUTER, r"\.layers\.\d+\.router\."),
    (Role.ROUTER, r"\.(e_score_correction_bias|expert_bias)$"),
    (Role.SHARED_EXPERT, r"\.(shared_experts?|shared_mlp)\."),
    (Role.ROUTED_EXPERT, r"\.experts\.|\.(block_sparse_moe|mlp)\.(input|output)_linear\."),
    (Role.NORM, r"(norm\w*|\bln_\w+)\.(weight|bias)$|\.layer_scalar$"),
    (Role.FFN, r"\.(mlp|feed_forward|ffn|mixer|fc1|fc2|per_layer_input_gate|per_layer_projection|altup|laurel)\."),
)
_ROLES = tuple((role, re.compile(pattern)) for role, pattern in _ROLE_PATTERNS)
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_IN_ONE_MATRIX = re.compile(r"\.experts\.mlp\.(w1|v1|w2)$")
"""Experts one below the other, as in DBRX: no slice along dimension 0 is one, so they are merged alike."""
_BY_TOKEN = re.compile(rf"(^|\.)(lm_head|embed_out|{_OF_TOKENS})\.weight$|{_OUTPUT}")
_UNSCORED = re.compile(
    r"(^|\.)(mtp\w*|visual\w*|vision_\w+|vision|image_\w+|audio_tower|\w*multi_?modal_projector|mm_projector|connector)\."
    r"|(^|\.)resampler_model\.|(^|\.)image_newline$"
    r"|(^|\.)(embed_vision|embed_audio|embed_tokens_extend|talker|code2wav|token2wav)\."
    r"|\.rotary_emb\.inv_freq$|\.(attn|attention)\.masked_bias$"
)
"""Multi-token prediction, vision and sound with their projectors, and constants that old checkpoints store."""
_MASK = re.compile(r"\.(attn|attention)\.bias$")
"""Where it has four dimensions, the causal mask that old checkpoints store."""


@dataclass(frozen=True)
class Part:
    """The smallest piece of a checkpoint that gets a coefficient of its own."""

    tensor: str
    """Name of the tensor in the checkpoint."""
    row: int | None
    """Index along dimension 0 if this is one expert of a packed tensor, else None."""
    block: int | None
    """Index of the transformer block, or None (embeddings, head, last norm)."""
    expert: int | None
    """Index of the routed expert, or None."""
    role: Role

    @property
    def cell(self) -> tuple[Role, int | None, int | None]:
        """The address that recipes select by: (role, block, expert)."""
        return (self.role, self.block, self.expert)

    def shape_in(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the part, its tensor being of a shape."""
        return tuple(shape if self.row is None else shape[1:])


@dataclass(frozen=True)
class Layout:
    """All parts of a checkpoint, in the checkpoint's order, and how many blocks and experts it has."""

    parts: tuple[Part, ...]
    n_blocks: int
    n_experts: int
    unscored: tuple[str, ...] = ()
    """Tensors that generating text does not use. They are no parts: nothing merges them."""

    def roles_in(self, block: int | None) -> tuple[Role, ...]:
        """Roles that occur in a block (or, for None, outside all blocks), in the order of Role."""
        present = {part.role for part in self.parts if part.block == block}
        return tuple(role for role in Role if role in present)

    def experts_in(self, block: int) -> tuple[int, ...]:
        """Indices of the routed experts of a block, ascending; empty for a dense block."""
        found = {p.expert for p in self.parts if p.block == block and p.expert is not None}
        return tuple(sorted(found))


class UnknownTensorError(ValueError):
    """A checkpoint holds tensors whose role cannot be read from their names."""


def parse_layout(shapes: Mapping[str, tuple[int, ...]], n_blocks: int | None = None) -> Layout:
    """Read a layout from tensor names and shapes.

    Args:
        shapes: checkpoint tensor name -> shape.
        n_blocks: how many blocks the model has, if it is known. Blocks behind them predict further tokens, as in
            DeepSeek-V3 (arXiv 2412.19437, section 2.2), and are unscored.

    Raises:
        UnknownTensorError: naming every tensor that no pattern understands.
    """
    parts: list[Part] = []
    unknown: list[str] = []
    unscored = dict.fromkeys(name for name, shape in shapes.items() if _is_unscored(name, shape, n_blocks))
    for name, shape in shapes.items():
        if name in unscored:
            continue
        role, block, expert = _address(name)
        if role is None:
            unknown.append(name)
            continue
        parts.extend(_parts_of(name, shape, role, block, expert))
    if unknown:
        raise UnknownTensorError(
            f"{len(unknown)} tensor(s) have a name from which no role can be read: {_some(unknown)}. "
            "Expected names like model.layers.N.self_attn..., .mlp..., .experts.E..., *norm, embed_tokens or "
            "lm_head. Add a pattern for this architecture to search_spaces/layout.py."
        )
    blocks = [part.block for part in parts if part.block is not None]
    experts = [part.expert for part in parts if part.expert is not None]
    return Layout(tuple(parts), max(blocks, default=-1) + 1, max(experts, default=-1) + 1, tuple(unscored))


def is_by_token(name: str) -> bool:
    """Whether a tensor has a row for each token."""
    return _BY_TOKEN.search(name) is not None


def _is_unscored(name: str, shape: tuple[int, ...], n_blocks: int | None) -> bool:
    _, block, _ = _address(name)
    beyond = n_blocks is not None and block is not None and block >= n_blocks
    return beyond or bool(_UNSCORED.search(name)) or (len(shape) == 4 and bool(_MASK.search(name)))


@functools.cache  # the checkpoints of a merge have the same names
def _address(name: str) -> tuple[Role | None, int | None, int | None]:
    """What a tensor's name says: its role, block and expert."""
    role = next((role for role, pattern in _ROLES if pattern.search(name)), None)
    return role, _number(_BLOCK, name), _number(_EXPERT, name)


def _number(pattern: re.Pattern[str], name: str) -> int | None:
    found = pattern.search(name)
    return int(found[1]) if found else None


def _parts_of(name: str, shape: tuple[int, ...], role: Role, block: int | None, expert: int | None) -> Iterable[Part]:
    is_stack = len(shape) > 2 or (".experts." in name and not _IN_ONE_MATRIX.search(name))  # (n_experts, ...)
    if role is Role.ROUTED_EXPERT and expert is None and is_stack:
        return [Part(name, row, block, row, role) for row in range(shape[0])]
    return [Part(name, None, block, expert, role)]


def _some(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
