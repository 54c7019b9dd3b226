"""A coefficient for each block and role: Sakana's parameter space (arXiv 2403.13187), split by role.

Roles are searched apart because merges break and gain at different places: routed experts carry skill
(arXiv 2506.14794), and without its feed-forward layers interpolated a model loses its thinking
(arXiv 2510.10977).
"""

from collections.abc import Sequence

from search_spaces.grouped import Group, GroupedSpace, Ingredients
from search_spaces.layout import Layout, Role


def block(layout: Layout, ingredients: Ingredients, *, roles: Sequence[Sequence[Role]] | None = None) -> GroupedSpace:
    """A space of one gene per (block, role group, donor).

    Args:
        layout: of the checkpoints.
        ingredients: the sources and how they are merged.
        roles: which roles share a gene, e.g. [[attention, norm], [routed_expert]]; a role that is in no
            group is copied from the base. Default: every role by itself. Roles are attention, ffn, shared_expert,
            routed_expert, router, norm, embedding and head.

    Raises:
        ValueError: if a role is in two groups, or a group is empty.
    """
    named = [role for group in roles or () for role in group]
    if roles is not None and (not named or not all(roles) or len(set(named)) < len(named)):
        raise ValueError(f"space.roles: expected lists of roles, each role in one of them at most, got {_plain(roles)}")
    return GroupedSpace(block_groups(layout, roles), ingredients, layout)


def _plain(roles: Sequence[Sequence[Role]]) -> list[list[str]]:
    return [[str(role) for role in group] for group in roles]


def block_groups(layout: Layout, roles: Sequence[Sequence[Role]] | None = None) -> list[Group]:
    """The (block, role) groups of a layout, outermost parts (embedding, head, last norm) last."""
    groups = [tuple(group) for group in roles] if roles else [(role,) for role in Role]
    found: list[Group] = []
    for index in [*range(layout.n_blocks), -1]:
        present = layout.roles_in(None if index == -1 else index)
        place = "model" if index == -1 else f"block{index}"
        here = [(group, tuple(role for role in group if role in present)) for group in groups]
        found += [
            Group(f"{place}.{'+'.join(some)}", some, (index,), kind="+".join(group)) for group, some in here if some
        ]
    return found
