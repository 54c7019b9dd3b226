"""What holds for every merge method; linear and task arithmetic by hand; knobs."""

import keyword

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evo.checkpoint import Checkpoint
from evo.materializer import Materializer
from evo.merge import METHODS, base_at_zero, get_method, one_hot
from evo.merge.linear import linear
from evo.merge.task_arithmetic import task_arithmetic
from search_spaces.expert import expert
from search_spaces.grouped import Ingredients
from search_spaces.recipe import Recipe, Rule, Source
from tests.merging import SETTINGS, arguments_of, merge

BASE, A, B = torch.tensor([1.0, -2.0, 4.0]), torch.tensor([3.0, 2.0, 4.0]), torch.tensor([-1.0, 0.0, 8.0])
RANDOM = [name for name in METHODS if get_method(name).random]


def test_linear_by_hand():
    # 0.25 * base + 0.5 * A + 0.25 * B
    assert linear([A, B], BASE, [0.5, 0.25]).tolist() == [1.5, 0.5, 5.0]


def test_task_arithmetic_by_hand():
    # base + 0.5 * (2, 4, 0) + 2 * (-2, 2, 4)
    assert task_arithmetic([A, B], BASE, [0.5, 2.0]).tolist() == [-2.0, 4.0, 12.0]


@pytest.mark.parametrize("name", ["linear", "task_arithmetic"])
@settings(deadline=None)
@given(data=st.data())
def test_mixtures_are_close_to_float64(name, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    n_donors = data.draw(st.integers(1, 4))
    coefficients = data.draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=n_donors, max_size=n_donors))
    base, *donors = (torch.from_numpy(rng.standard_normal(50, dtype=np.float32)) for _ in range(n_donors + 1))
    # Both are the same polynomial: base + sum c (donor - base) = (1 - sum c) base + sum c donor.
    expected = base.double() + sum(c * (d.double() - base.double()) for c, d in zip(coefficients, donors, strict=True))
    assert get_method(name).is_mixture
    assert torch.allclose(merge(name, donors, base, coefficients).double(), expected, atol=1e-5)


def knobs_of(method, data):
    """Random values, often at the ends of the range."""
    return {
        name: data.draw(st.sampled_from([knob.low, knob.high, knob.default, *_inside(knob)]))
        for name, knob in method.knobs.items()
    }


def _inside(knob):
    return [] if knob.step == 1.0 else [knob.low + 0.3 * (knob.high - knob.low)]


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_finite_pure_and_a_copy_where_one_is_claimed(name, data):
    method = get_method(name)
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    n_donors = data.draw(st.integers(1, 4))
    shape = data.draw(st.sampled_from([(7, 9), (40,), (1,), (3, 2, 4)]))
    coefficients = data.draw(st.lists(st.sampled_from([0.0, 0.3, 1.0, 1.5]), min_size=n_donors, max_size=n_donors))
    knobs = knobs_of(method, data)
    base, *donors = (torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for _ in range(n_donors + 1))
    if data.draw(st.booleans()):
        donors[-1] = base.clone()  # a donor that did not change this tensor
    before = [t.clone() for t in (base, *donors)]
    merged = merge(name, donors, base, coefficients, knobs)
    assert all(torch.equal(t, was) for t, was in zip((base, *donors), before, strict=True))
    assert merged.shape == base.shape and torch.isfinite(merged).all()
    named = {chr(ord("a") + d): donor for d, donor in enumerate(donors)}
    arguments = arguments_of(name, named, base, knobs)
    copied = method.copy_of(coefficients, **{k: v for k, v in arguments.items() if k not in ("stats", "noise")})
    if copied is None and method.copy_once_measured:
        copied = method.copy_once_measured(coefficients, **arguments)
    if copied is not None:
        assert torch.allclose(merged, [base, *donors][copied], atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_base_without_change_is_kept(name):
    """Where all donors equal the base, so does every merge."""
    base = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    knobs = {k: v for k, v in SETTINGS.get(name, {}).items() if k not in ("scale", "origin")}
    merged = merge(name, [base.clone(), base.clone()], base, [0.5, 0.25], knobs)
    assert torch.allclose(merged, base, atol=1e-6)


def recipe_of(parents, name, seed=7):
    """Coefficients for each expert, with exact zeros and ones among them."""
    sources = {name: Source(str(path)) for name, path in parents.items()}
    layout = Checkpoint.open(parents["a"]).layout
    space = expert(layout, Ingredients(sources, "base", ("a", "b"), "a", name, knobs=SETTINGS.get(name, {}), seed=seed))
    rng = np.random.default_rng(1)
    genome = rng.random(len(space.genes), dtype=np.float32)
    genome[rng.random(len(genome)) < 0.2] = 0.0
    genome[rng.random(len(genome)) < 0.2] = 1.0
    return space.decode(genome)


def streamed(parents, recipe):
    return dict(Materializer({n: Checkpoint.open(p) for n, p in parents.items()}).stream(recipe))


@pytest.mark.parametrize("name", METHODS)
def test_scored_is_exported_whatever_the_blocks(moe_parents, name, monkeypatch):
    recipe = recipe_of(moe_parents, name)
    checkpoints = {n: Checkpoint.open(p) for n, p in moe_parents.items()}
    slots = {n: torch.empty_like(checkpoints["a"].tensor(n)) for n in checkpoints["a"].headers}
    resident = Materializer(checkpoints, slots)
    resident.write(Recipe(recipe.sources, "base", "a", (Rule(name, {"a": 0.5, "b": 0.75}),), recipe.seed).to_dict())
    resident.write(recipe.to_dict())
    whole = streamed(moe_parents, recipe)
    assert all(torch.equal(whole[n], t) for n, t in slots.items())
    assert all(torch.isfinite(t).all() for t in slots.values())
    assert any(not torch.equal(t, checkpoints["base"].tensor(n)) for n, t in whole.items())
    monkeypatch.setattr("evo.merging.CHUNK_ELEMENTS", 61)
    monkeypatch.setattr("evo.merge.statistics.BLOCK_ELEMENTS", 97)
    assert all(torch.equal(whole[n], t) for n, t in streamed(moe_parents, recipe).items())


@pytest.mark.parametrize("name", METHODS)
def test_statistics_are_measured_once(moe_parents, name, monkeypatch):
    method = get_method(name)
    if method.measure is None:
        pytest.skip("looks at single elements only")
    checkpoints = {n: Checkpoint.open(p) for n, p in moe_parents.items()}
    materializer = Materializer(checkpoints, {n: checkpoints["a"].tensor(n).clone() for n in checkpoints["a"].headers})
    recipe = recipe_of(moe_parents, name)
    for coefficient in (0.25, 0.5, 0.75):
        rules = (Rule(name, {"a": coefficient, "b": coefficient}, knobs=SETTINGS.get(name, {})),)
        materializer.write(Recipe(recipe.sources, "base", "a", rules).to_dict())
        n_measured = len(materializer._merger.measured)
        assert n_measured == len(materializer.layout.parts) * (2 if method.measure.per_donor else 1)


@pytest.mark.parametrize("name", RANDOM)
def test_masks_belong_to_the_seed_and_the_place(moe_parents, name):
    one, again, other = (streamed(moe_parents, recipe_of(moe_parents, name, seed)) for seed in (7, 7, 8))
    assert all(torch.equal(one[n], t) for n, t in again.items())
    assert any(not torch.equal(one[n], t) for n, t in other.items()), (
        f"{name} draws nothing with {SETTINGS.get(name, 'its defaults')}: give knobs with which it does in SETTINGS of "
        "tests/merging.py"
    )


@pytest.mark.parametrize("name", RANDOM)
def test_another_seed_is_written_anew(moe_parents, name):
    checkpoints = {n: Checkpoint.open(p) for n, p in moe_parents.items()}
    materializer = Materializer(checkpoints, {n: checkpoints["a"].tensor(n).clone() for n in checkpoints["a"].headers})
    assert materializer.write(recipe_of(moe_parents, name, seed=1).to_dict()).n_skipped == 0
    assert materializer.write(recipe_of(moe_parents, name, seed=1).to_dict()).n_written == 0
    assert materializer.write(recipe_of(moe_parents, name, seed=2).to_dict()).n_written > 0


def test_packed_experts_are_merged_each_by_itself(moe_parents, tmp_path):
    """Thresholds of an expert are those of its own slice, not of the block's packed tensor."""
    from tests.packing import pack

    packed = {name: pack(path, tmp_path / name) for name, path in moe_parents.items()}
    split, joined = (streamed(p, recipe_of(p, "ties")) for p in (moe_parents, packed))
    name = "model.layers.1.mlp.experts.down_proj"
    expected = torch.stack([split[f"model.layers.1.mlp.experts.{e}.down_proj.weight"] for e in range(8)])
    assert torch.equal(joined[name], expected)


@pytest.mark.parametrize(
    ("coefficients", "expected"),
    [([0.0], 0), ([1.0], 1), ([0.5], None), ([0.0, 1.0], 2), ([1.0, 1.0], None), ([1.0, 0.5], None), ([0.0, 0.0], 0)],
)
def test_one_hot(coefficients, expected):
    assert one_hot(coefficients) == expected
    assert base_at_zero(coefficients) == (0 if expected == 0 else None)


class TestKnobs:
    def test_defaults_donors_and_reserved_words(self):
        arguments = get_method("ties").arguments({"density": 0.5, "density:b": 0.25}, ("a", "b"))
        assert arguments == {"density": (0.5, 0.25), "normalize": 1.0, "lambda_": 1.0}

    @pytest.mark.parametrize("name", METHODS)
    def test_defaults_are_in_range(self, name):
        for knob_name, knob in get_method(name).knobs.items():
            knob.check(knob_name, knob.default)
            assert knob.low < knob.high and (knob_name.isidentifier() or keyword.iskeyword(knob_name))

    @pytest.mark.parametrize(
        ("knobs", "message"),
        [
            ({"densty": 0.5}, "no knob is called 'densty': expected one of density, normalize, lambda; did you mean"),
            ({"density": 1.5}, "knob 'density': expected 0 to 1, got 1.5"),
            ({"density": float("nan")}, "expected 0 to 1, got nan"),
            ({"normalize": 0.5}, "knob 'normalize': expected a whole number, got 0.5"),
            ({"density:c": 0.5}, "'c' is no donor, expected one of a, b"),
            ({"lambda:a": 0.5}, "'lambda' is one number for all donors"),
        ],
    )
    def test_mistakes(self, knobs, message):
        with pytest.raises(ValueError, match=r".*") as error:
            get_method("ties").arguments(knobs, ("a", "b"))
        assert message in str(error.value)

    def test_a_recipe_with_a_mistake_names_its_method(self, moe_parents):
        sources = {n: Source(str(p)) for n, p in moe_parents.items()}
        recipe = Recipe(sources, "base", "a", (Rule("linear", {"a": 0.5}, knobs={"density": 0.5}),))
        with pytest.raises(ValueError, match="linear: no knob is called 'density': this method has none"):
            streamed(moe_parents, recipe)

    def test_unknown_method(self):
        with pytest.raises(ValueError, match="no merge method is called 'tie'"):
            get_method("tie")


def test_methods_of_task_vectors_take_the_ancestor_as_their_base():
    """Where a config has one. What interpolates between models takes a parent."""
    of_task_vectors = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs")
    of_task_vectors += ("breadcrumbs_ties", "sce", "model_stock", "ram")
    assert {name for name in METHODS if get_method(name).from_ancestor} == set(of_task_vectors)
