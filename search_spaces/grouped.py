"""The space that line, block and expert share: groups of parts, one gene a group and donor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from search_spaces.genes import Gene, Genome, check_genome
from search_spaces.layout import Layout, Role
from search_spaces.recipe import Recipe, Rule, Source


@dataclass(frozen=True)
class Group:
    """Parts that share one coefficient per donor. None selects everything, as in a Rule."""

    name: str
    roles: tuple[Role, ...] | None = None
    blocks: tuple[int, ...] | None = None
    experts: tuple[int, ...] | None = None
    kind: str = ""
    """Groups of one kind differ in their place only, as attention in block 1 and in block 2."""


@dataclass(frozen=True)
class Ingredients:
    """What every space needs besides its groups: the sources and how they are merged."""

    sources: Mapping[str, Source]
    base: str
    donors: tuple[str, ...]
    interface: str
    method: str = "linear"
    bounds: tuple[float, float] = (0.0, 1.0)
    knobs: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0


class GroupedSpace:
    """Genes are laid out group by group, and donor by donor within a group: gene g * n_donors + d."""

    def __init__(self, groups: Sequence[Group], ingredients: Ingredients, layout: Layout) -> None:
        self.groups = tuple(groups)
        self.ingredients = ingredients
        low, high = ingredients.bounds
        self.genes = tuple(Gene(f"{g.name}:{d}", low, high) for g in self.groups for d in ingredients.donors)
        # A mixture is uniform only if no part is left to the base alone.
        recipe = self.decode(np.zeros(len(self.genes), np.float32))
        self._covers_all = all(rule is not None for rule in recipe.assign(layout).values())

    def decode(self, genome: Genome) -> Recipe:
        """See SearchSpace."""
        check_genome(genome, len(self.genes))
        values = [gene.value(float(x)) for gene, x in zip(self.genes, genome, strict=True)]
        part, n_donors = self.ingredients, len(self.ingredients.donors)
        rules = tuple(
            Rule(
                method=part.method,
                coefficients=dict(zip(part.donors, values[i * n_donors : (i + 1) * n_donors], strict=True)),
                roles=group.roles,
                blocks=group.blocks,
                experts=group.experts,
                knobs=part.knobs,
            )
            for i, group in enumerate(self.groups)
        )
        return Recipe(part.sources, part.base, part.interface, rules, part.seed)

    def uniform(self, shares: Mapping[str, float]) -> Genome | None:
        """See SearchSpace. Exact for the methods in which donors enter linearly."""
        part = self.ingredients
        expressible = {part.base, *part.donors}
        if not self._covers_all or any(share and name not in expressible for name, share in shares.items()):
            return None
        rest = sum(share for name, share in shares.items() if name in part.donors)
        if abs(1.0 - rest - shares.get(part.base, 0.0)) > 1e-6:  # what donors leave over is the base's
            return None
        values = [shares.get(donor, 0.0) for donor in part.donors] * len(self.groups)
        genes = [gene.gene(value) for gene, value in zip(self.genes, values, strict=True)]
        return None if any(g is None for g in genes) else np.array(genes, np.float32)

    def swaps(self) -> dict[str, Genome]:
        """See SearchSpace."""
        of_donor = len(self.ingredients.donors) * np.arange(len(self.groups))  # each group's gene of the first donor
        on, off = (self.genes[0].gene(value) for value in (1.0, 0.0))
        kinds = dict.fromkeys(group.kind for group in self.groups)
        if on is None or off is None or len(kinds) < 2:
            return {}
        found = {}
        for kind in kinds:
            chosen = np.array([group.kind == kind for group in self.groups])
            for name, donated in (("only", chosen), ("but", ~chosen)):
                genome = np.full(len(self.genes), off, np.float32)
                genome[of_donor[donated]] = on
                found[f"{name}-{kind}"] = genome
        return found
