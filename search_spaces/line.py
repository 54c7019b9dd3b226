"""One coefficient per donor for the whole model: the line between two parents, the plane of three.

The baseline that every other space must beat (arXiv 2510.10977).
"""

from search_spaces.grouped import Group, GroupedSpace, Ingredients
from search_spaces.layout import Layout


def line(layout: Layout, ingredients: Ingredients) -> GroupedSpace:
    """A space of n_donors genes."""
    return GroupedSpace([Group("all")], ingredients, layout)
