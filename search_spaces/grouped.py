"""The space that line, block and expert share: groups of parts, one gene a group and donor (and knob)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from search_spaces.genes import Gene, Genome, check_genome
from search_spaces.layout import Layout, Role
from search_spaces.recipe import Recipe, Rule, Source


@dataclass(frozen=True)
class Group:
    """Parts that share one coefficient per donor, and knobs. None selects everything, as in a Rule."""

    name: str
    roles: tuple[Role, ...] | None = None
    blocks: tuple[int, ...] | None = None
    experts: tuple[int, ...] | None = None
    kind: str = ""
    """Groups of one kind differ in their place only, as attention in block 1 and in block 2."""

    def __post_init__(self) -> None:
        if () in (self.roles, self.blocks, self.experts):
            raise ValueError(f"the group {self.name!r} selects nothing: expected roles, blocks and experts, or None")


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
    """Knobs that are the same everywhere."""
    knob_genes: tuple[Gene, ...] = ()
    """Knobs that are searched, one gene each for every group; they are named as in a Rule."""
    is_mixture: bool = True
    """Whether coefficients are shares of a linear mixture."""
    seed: int = 0


class GroupedSpace:
    """Genes are laid out group by group; within a group come the donors' coefficients, then the knobs."""

    def __init__(self, groups: Sequence[Group], ingredients: Ingredients, layout: Layout) -> None:
        self.groups = tuple(groups)
        self.ingredients = ingredients
        low, high = ingredients.bounds
        of_group = [*(Gene(donor, low, high) for donor in ingredients.donors), *ingredients.knob_genes]
        self.genes = tuple(replace(gene, name=f"{g.name}:{gene.name}") for g in self.groups for gene in of_group)
        self._mixes = ingredients.is_mixture and not ingredients.knob_genes
        # A mixture is uniform only if no part is left to the base alone.
        recipe = self.decode(np.zeros(len(self.genes), np.float32))
        self._covers_all = all(rule is not None for rule in recipe.assign(layout).values())

    def decode(self, genome: Genome) -> Recipe:
        """See SearchSpace."""
        check_genome(genome, len(self.genes))
        values = [gene.value(float(x)) for gene, x in zip(self.genes, genome, strict=True)]
        part = self.ingredients
        n = len(part.donors) + len(part.knob_genes)
        rules = tuple(self._rule(group, values[i * n : (i + 1) * n]) for i, group in enumerate(self.groups))
        return Recipe(part.sources, part.base, part.interface, rules, part.seed)

    def _rule(self, group: Group, values: Sequence[float]) -> Rule:
        part = self.ingredients
        n_donors = len(part.donors)
        searched = {gene.name: value for gene, value in zip(part.knob_genes, values[n_donors:], strict=True)}
        return Rule(
            method=part.method,
            coefficients=dict(zip(part.donors, values[:n_donors], strict=True)),
            roles=group.roles,
            blocks=group.blocks,
            experts=group.experts,
            knobs={**part.knobs, **searched},
        )

    def uniform(self, shares: Mapping[str, float]) -> Genome | None:
        """See SearchSpace. None for methods that do not mix linearly, or whose knobs are searched, too."""
        part = self.ingredients
        expressible = {part.base, *part.donors}
        if (
            not self._mixes
            or not self._covers_all
            or any(share and name not in expressible for name, share in shares.items())
        ):
            return None
        rest = sum(share for name, share in shares.items() if name in part.donors)
        if abs(1.0 - rest - shares.get(part.base, 0.0)) > 1e-6:  # what donors leave over is the base's
            return None
        values = [shares.get(donor, 0.0) for donor in part.donors] * len(self.groups)
        genes = [gene.gene(value) for gene, value in zip(self.genes, values, strict=True)]
        return None if any(g is None for g in genes) else np.array(genes, np.float32)

    def swaps(self) -> dict[str, Genome]:
        """See SearchSpace."""
        if not self._mixes:
            return {}
        of_donor = len(self.ingredients.donors) * np.arange(len(self.groups))  # each group's gene of the first donor
        on, off = (self.genes[0].gene(value) for value in (1.0, 0.0))
        kinds = dict.fromkeys(group.kind for group in self.groups)
        if on is None or off is None or len(kinds) < 2:
            return {}
        found: dict[str, Genome] = {}
        for kind in kinds:
            chosen = np.array([group.kind == kind for group in self.groups])
            for name, donated in (("only", chosen), ("but", ~chosen)):
                genome = np.full(len(self.genes), off, np.float32)
                genome[of_donor[donated]] = on
                found[f"{name}-{kind}"] = genome
        return {f"only-{kind}": found[f"only-{kind}"] for kind in kinds} if len(kinds) == 2 else found
