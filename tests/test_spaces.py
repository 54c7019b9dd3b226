"""Spaces and recipes. Contract tests run over the table of spaces."""

import pkgutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_spaces import SPACES
from search_spaces.block import block
from search_spaces.expert import expert
from search_spaces.genes import Gene
from search_spaces.grouped import Group, GroupedSpace, Ingredients
from search_spaces.layout import Role, parse_layout
from search_spaces.recipe import Recipe, Rule, Source

SOURCES = {name: Source(f"/models/{name}") for name in ("base", "reasoner", "concise")}
SHAPES = {
    "model.embed_tokens.weight": (8, 4),
    "lm_head.weight": (8, 4),
    "model.norm.weight": (4,),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.mlp.up_proj.weight": (4, 4),
    "model.layers.1.self_attn.q_proj.weight": (4, 4),
    "model.layers.1.mlp.gate.weight": (4, 4),
    "model.layers.1.mlp.shared_experts.up_proj.weight": (4, 4),
    **{f"model.layers.1.mlp.experts.{e}.up_proj.weight": (4, 4) for e in range(4)},
}
LAYOUT = parse_layout(SHAPES)
TWO = Ingredients(SOURCES, base="concise", donors=("reasoner",), interface="reasoner")
THREE = Ingredients(SOURCES, "base", ("reasoner", "concise"), "reasoner", method="task_arithmetic", bounds=(0.0, 1.5))


def make(name, ingredients):
    return pkgutil.resolve_name(SPACES[name])(LAYOUT, ingredients)


def coefficients(recipe):
    return {part.tensor: rule and dict(rule.coefficients) for part, rule in recipe.assign(LAYOUT).items()}


@pytest.mark.parametrize("roles", [[], [[]], [["attention"], ["attention"]], [["attention", "attention"]]])
def test_groups_of_roles_that_cannot_be_meant(roles):
    with pytest.raises(ValueError, match=r"space.roles: expected lists of roles, each role in one of them"):
        block(LAYOUT, TWO, roles=[[Role(role) for role in group] for group in roles])


@pytest.mark.parametrize("ingredients", [TWO, THREE], ids=["linear", "task_arithmetic"])
@pytest.mark.parametrize("name", SPACES)
class TestContract:
    def test_ends_of_the_genome_are_the_bounds(self, name, ingredients):
        space = make(name, ingredients)
        low, high = ingredients.bounds
        for gene, bound in ((0.0, low), (1.0, high)):
            recipe = space.decode(np.full(len(space.genes), gene, np.float32))
            expected = dict.fromkeys(ingredients.donors, bound)
            assert all(values == expected for values in coefficients(recipe).values())

    def test_one_gene_moves_only_its_own_parts(self, name, ingredients):
        space = make(name, ingredients)
        if not isinstance(space, GroupedSpace):
            pytest.skip(f"genes of {name} may overlap")
        n = len(space.genes)
        moved = [
            {t for t, v in coefficients(space.decode(np.eye(n, dtype=np.float32)[i])).items() if any(v.values())}
            for i in range(n)
        ]
        assert set().union(*moved) == set(SHAPES)  # together they reach every tensor
        for d in range(len(ingredients.donors)):  # and for one donor, no tensor twice
            of_donor = moved[d :: len(ingredients.donors)]
            assert sum(map(len, of_donor)) == len(SHAPES)

    def test_recipes_survive_their_files(self, name, ingredients):
        space = make(name, ingredients)
        genome = np.random.default_rng(0).random(len(space.genes), dtype=np.float32)
        recipe = space.decode(genome)
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe
        assert Recipe.from_dict(recipe.to_dict()).digest == recipe.digest

    def test_uniform_mixtures_are_what_they_say(self, name, ingredients):
        space = make(name, ingredients)
        assert space.uniform({"nobody": 1.0}) is None
        assert space.uniform({"reasoner": 7.0}) is None
        genome = space.uniform({"reasoner": 0.5, "concise": 0.5})
        if genome is None and not isinstance(space, GroupedSpace):
            pytest.skip(f"{name} has no uniform mixtures")
        expected = dict.fromkeys(ingredients.donors, 0.5)
        assert all(values == pytest.approx(expected) for values in coefficients(space.decode(genome)).values())

    @pytest.mark.parametrize("bad", ["shape", "range", "nan"])
    def test_bad_genomes_are_refused(self, name, ingredients, bad):
        space = make(name, ingredients)
        n = len(space.genes)
        genome = {"shape": np.zeros(n + 1), "range": np.full(n, 1.1), "nan": np.full(n, np.nan)}[bad]
        with pytest.raises(ValueError, match=r"expected a genome of shape|must lie in"):
            space.decode(genome.astype(np.float32))


def test_expert_space_has_a_gene_for_each_expert():
    assert len(expert(LAYOUT, TWO, rest="base").genes) == 4  # block 0 is dense
    names = [gene.name for gene in expert(LAYOUT, TWO).genes]
    assert names[:2] == ["block1.expert0:reasoner", "block1.expert1:reasoner"]
    assert "block1.routed_expert:reasoner" not in names


def test_swaps_take_one_set_of_roles_from_the_donor():
    """R1T-Chimera's published recipe is only-routed_expert: routed experts of R1, the rest of V3-0324."""
    space = block(LAYOUT, TWO, roles=[[Role.ATTENTION], [Role.ROUTED_EXPERT, Role.FFN], [Role.NORM, Role.HEAD]])
    swaps = space.swaps()
    assert list(swaps) == [
        f"{side}-{kind}" for kind in ("attention", "routed_expert+ffn", "norm+head") for side in ("only", "but")
    ]
    only = coefficients(space.decode(swaps["only-routed_expert+ffn"]))
    but = coefficients(space.decode(swaps["but-routed_expert+ffn"]))
    for name, value in only.items():
        if value is None:
            continue  # a role that the space leaves to the base
        expected = 1.0 if "experts.0" in name or ".experts." in name or "layers.0.mlp" in name else 0.0
        assert value == {"reasoner": expected}, name
        assert but[name] == {"reasoner": 1.0 - expected}, name


@pytest.mark.parametrize("nothing", [{"roles": ()}, {"blocks": ()}, {"experts": ()}])
def test_a_group_of_nothing_is_refused(nothing):
    with pytest.raises(ValueError, match="the group 'lower' selects nothing: expected roles, blocks and experts, or N"):
        Group("lower", **nothing)


def test_of_two_kinds_each_swap_is_one_and_all_but_the_other():
    space = block(LAYOUT, TWO, roles=[[Role.ATTENTION], [Role.ROUTED_EXPERT, Role.FFN]])
    swaps = space.swaps()
    assert list(swaps) == ["only-attention", "only-routed_expert+ffn"]
    assert np.array_equal(sum(swaps.values()), np.ones(len(space.genes)))


def test_the_line_has_no_swaps_and_experts_are_one_kind():
    assert make("line", TWO).swaps() == {}
    assert "only-routed_expert" in make("expert", TWO).swaps()


def test_expert_space_refuses_dense_checkpoints():
    with pytest.raises(ValueError, match="use 'block'"):
        expert(parse_layout({"lm_head.weight": (2, 2)}), TWO)


def test_roles_left_out_of_a_block_space_are_the_base():
    space = block(LAYOUT, TWO, roles=[[Role.ATTENTION, Role.FFN], [Role.ROUTED_EXPERT]])
    assert [g.name for g in space.genes] == [
        "block0.attention+ffn:reasoner",
        "block1.attention:reasoner",
        "block1.routed_expert:reasoner",
    ]
    values = coefficients(space.decode(np.ones(3, np.float32)))
    assert values["lm_head.weight"] is None
    assert space.uniform({"reasoner": 1.0}) is None  # the head would stay behind


def test_packed_and_per_expert_checkpoints_have_the_same_genes():
    packed = {k: v for k, v in SHAPES.items() if ".experts." not in k}
    packed["model.layers.1.mlp.experts.up_proj"] = (4, 4, 4)
    assert [g.name for g in expert(parse_layout(packed), TWO).genes] == [g.name for g in expert(LAYOUT, TWO).genes]


def test_the_first_rule_wins():
    rules = (
        Rule("linear", {"reasoner": 0.25}, roles=(Role.ROUTED_EXPERT,), blocks=(1,), experts=(2,)),
        Rule("linear", {"reasoner": 1.0}, roles=(Role.ROUTED_EXPERT,)),
    )
    values = coefficients(Recipe(SOURCES, "concise", "reasoner", rules))
    assert values["model.layers.1.mlp.experts.2.up_proj.weight"] == {"reasoner": 0.25}
    assert values["model.layers.1.mlp.experts.3.up_proj.weight"] == {"reasoner": 1.0}
    assert values["lm_head.weight"] is None


@pytest.mark.parametrize("number", [np.float32(0.7), np.float64(0.7), np.int64(1)])
def test_numbers_of_numpy_are_taken_as_what_they_are(number):
    recipe = Recipe(SOURCES, "concise", "reasoner", (Rule("ties", {"reasoner": number}, knobs={"density": number}),))
    (rule,) = Recipe.from_yaml(recipe.to_yaml()).rules
    assert rule.coefficients["reasoner"] == rule.knobs["density"] == number.item()
    for bad in (type(number)(1) * np.inf, "1", None):
        with pytest.raises(ValueError, match="knob density: expected a number that float32 has"):
            Rule("ties", {}, knobs={"density": bad})


@given(st.data())
def test_assign_agrees_with_brute_force(data):
    def some(values):
        return data.draw(st.none() | st.lists(st.sampled_from(values), min_size=1, unique=True).map(tuple))

    rules = tuple(
        Rule("linear", {"reasoner": i / 8}, some(list(Role)), some([-1, 0, 1]), some([0, 1, 2, 3]))
        for i in range(data.draw(st.integers(0, 4)))
    )
    for part, rule in Recipe(SOURCES, "concise", "reasoner", rules).assign(LAYOUT).items():
        block_index = -1 if part.block is None else part.block
        matching = [
            r
            for r in rules
            if (r.roles is None or part.role in r.roles)
            and (r.blocks is None or block_index in r.blocks)
            and (r.experts is None or part.expert in r.experts)
        ]
        assert rule is (matching[0] if matching else None)


def test_a_recipe_refuses_names_without_a_source():
    with pytest.raises(ValueError, match=r"no source is called 'stranger'"):
        Recipe(SOURCES, "concise", "reasoner", (Rule("linear", {"stranger": 1.0}),))


@pytest.mark.parametrize("text", ["version: 99", "version: 1\nbase: x", "version: 1\nrules: [{methd: x}]", "[]"])
def test_files_that_are_no_recipe_are_refused(text):
    with pytest.raises((ValueError, AttributeError)):
        Recipe.from_yaml(text)


class TestSearchedKnobs:
    INGREDIENTS = Ingredients(
        SOURCES, "base", ("reasoner", "concise"), "reasoner", "ties",
        knobs={"lambda": 0.9},
        knob_genes=(Gene("density", 0.2, 1.0, step=1 / 128), Gene("density:concise", 0.0, 0.5)),
        is_mixture=False,
    )  # fmt: skip

    def test_a_mixture_that_has_some_gives_baselines_no_genome(self):
        space = block(LAYOUT, replace(self.INGREDIENTS, is_mixture=True))
        assert space.uniform({"base": 1.0}) is None and space.swaps() == {}

    def test_every_group_has_its_own(self):
        space = block(LAYOUT, self.INGREDIENTS, roles=[[Role.ATTENTION], [Role.NORM]])
        names = [gene.name for gene in space.genes[:4]]
        assert names == [f"block0.attention:{n}" for n in ("reasoner", "concise", "density", "density:concise")]
        genome = np.linspace(0, 1, len(space.genes), dtype=np.float32)
        for i, rule in enumerate(space.decode(genome).rules):
            assert list(rule.coefficients.values()) == pytest.approx(genome[4 * i : 4 * i + 2])
            assert set(rule.knobs) == {"lambda", "density", "density:concise"} and rule.knobs["lambda"] == 0.9
            assert rule.knobs["density"] == pytest.approx(0.2 + 0.8 * genome[4 * i + 2], abs=1 / 256)
            assert (rule.knobs["density"] * 128).is_integer()
            assert rule.knobs["density:concise"] == pytest.approx(0.5 * genome[4 * i + 3])

    def test_survive_their_files(self):
        space = block(LAYOUT, self.INGREDIENTS)
        recipe = space.decode(np.full(len(space.genes), 0.3, np.float32))
        assert Recipe.from_yaml(recipe.to_yaml()).digest == recipe.digest

    def test_what_does_not_mix_linearly_has_no_mixtures(self):
        space = block(LAYOUT, self.INGREDIENTS)
        assert space.uniform({"reasoner": 1.0}) is None and space.swaps() == {}


def test_steps_round_within_the_bounds():
    gene = Gene("n", 0.9, 5.2, step=1.0)
    assert [gene.value(x) for x in (0.0, 0.5, 1.0)] == [1.0, 3.0, 5.0]
    assert Gene("d", 0.1, 0.3, step=1 / 4).value(0.0) == 0.1  # no multiple below: the bound itself


class TestTensorsSelector:
    LAYOUT = parse_layout(
        {
            f"model.layers.{i}.{name}.weight": (4, 4)
            for i in range(2)
            for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
        }
    )

    def methods(self, *rules):
        recipe = Recipe({n: Source(n) for n in "ab"}, "b", "a", rules)
        return {part.tensor: rule and rule.method for part, rule in recipe.assign(self.LAYOUT).items()}

    def test_names_and_other_selectors_must_both_hold(self):
        chosen = self.methods(Rule("linear", {"a": 0.5}, blocks=(1,), tensors=("*.q_proj.weight", "*.up_proj.*")))
        assert {name for name, method in chosen.items() if method} == {
            "model.layers.1.self_attn.q_proj.weight",
            "model.layers.1.mlp.up_proj.weight",
        }

    def test_the_first_rule_wins_whether_it_names_tensors_or_not(self):
        named = Rule("slerp", {"a": 0.5}, tensors=("*.q_proj.weight",))
        by_role, everything = Rule("linear", {"a": 0.5}, roles=(Role.ATTENTION,)), Rule("ties", {"a": 0.5})
        q = "model.layers.0.self_attn.q_proj.weight"
        assert self.methods(named, by_role)[q] == "slerp" and self.methods(by_role, named)[q] == "linear"
        assert self.methods(everything, named)[q] == "ties" and self.methods(named, everything)[q] == "slerp"

    def test_a_recipe_file_holds_it(self):
        recipe = Recipe({n: Source(n) for n in "ab"}, "b", "a", (Rule("linear", {"a": 0.5}, tensors=("*.q*",)),))
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe
