"""A coefficient for each routed expert of each block.

R1T-Chimera took all routed experts from one parent (arXiv 2506.14794); here each has a gene of its own,
n_blocks x n_experts in all (dense blocks have none).
"""

from typing import Literal

from search_spaces.block import block_groups
from search_spaces.grouped import Group, GroupedSpace, Ingredients
from search_spaces.layout import Layout, Role


def expert(
    layout: Layout, ingredients: Ingredients, *, rest: Literal["block", "line", "base"] = "block"
) -> GroupedSpace:
    """A space of one gene per routed expert and donor, and the rest as asked.

    Args:
        layout: of the checkpoints.
        ingredients: the sources and how they are merged.
        rest: what happens to all other parts: "block", a gene per block and role; "line", one gene;
            "base", copied from the base.

    Raises:
        ValueError: if the checkpoints have no routed experts.
    """
    if not layout.n_experts:
        raise ValueError("space 'expert' needs routed experts, and these checkpoints have none: use 'block'")
    groups = [
        Group(f"block{b}.expert{e}", (Role.ROUTED_EXPERT,), (b,), (e,), kind=Role.ROUTED_EXPERT)
        for b in range(layout.n_blocks)
        for e in layout.experts_in(b)
    ]
    if rest == "block":
        others = [[role] for role in Role if role is not Role.ROUTED_EXPERT]
        groups += block_groups(layout, others)
    elif rest == "line":
        groups.append(Group("rest", tuple(role for role in Role if role is not Role.ROUTED_EXPERT), kind="rest"))
    return GroupedSpace(groups, ingredients, layout)
