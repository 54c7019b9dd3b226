"""Recipes said in mergekit's YAML: there and back, and what it has no words for."""

import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from evo.checkpoint import Checkpoint
from evo.materializer import Materializer
from evo.mergekit.writer import CannotSayError, write_mergekit
from search_spaces.block import block
from search_spaces.expert import expert
from search_spaces.grouped import Ingredients
from search_spaces.layout import Role
from search_spaces.recipe import Recipe, Rule, Source
from tests.conftest import make_checkpoint
from tests.encoding import files_of


def of_space(models, method, knobs=None, seed=0, base="base", donors=("a", "b")):
    """A recipe of the block space, with exact zeros and ones among the coefficients."""
    sources = {name: Source(str(models / name)) for name in ("base", "a", "b")}
    layout = Checkpoint.open(models / "a").layout
    space = block(layout, Ingredients(sources, base, donors, "a", method, knobs=knobs or {}))
    rng = np.random.default_rng(seed)
    genome = rng.random(len(space.genes), dtype=np.float32)
    genome[rng.random(len(genome)) < 0.3] = 0.0
    return space.decode(genome)


ROUND_TRIPS = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.5, "density:b": 0.3, "lambda": 0.9},
    "breadcrumbs": {"density": 0.6, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.5, "gamma:a": 0.2},
    "slerp": {},
    "nuslerp": {},
    "multislerp": {},
}


class TestWriter:
    @pytest.mark.parametrize("method", ROUND_TRIPS)
    def test_there_and_back_gives_the_same_bits(self, models, merged, method):
        donors = ("a",) if method in ("slerp", "nuslerp") else ("a", "b")
        recipe = of_space(models, method, ROUND_TRIPS[method], donors=donors)
        if method == "multislerp":
            halved = [Rule(r.method, {d: c / 2 for d, c in r.coefficients.items()}, r.roles, r.blocks)
                      for r in recipe.rules]  # fmt: skip
            recipe = Recipe(recipe.sources, recipe.base, recipe.interface, tuple(halved))
        sources = {name: Checkpoint.open(models / name) for name in recipe.sources}
        text, notes = write_mergekit(recipe, sources)
        assert notes == []
        expected = dict(Materializer(sources).stream(recipe))
        found = merged(text)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            if method == "multislerp":  # weights are divided by their sum, which rounds
                assert torch.allclose(found[name], tensor, rtol=1e-6, atol=1e-7), name
            else:
                assert torch.equal(found[name], tensor), name

    @pytest.mark.parametrize("method", ["sce", "model_stock", "ram", "karcher"])
    def test_methods_without_weights(self, models, merged, method):
        c = 1 / 3 if method == "karcher" else 1.0
        sources = {name: Source(str(models / name)) for name in ("base", "a", "b")}
        recipe = Recipe(sources, "base", "base", (Rule(method, {"a": c, "b": c}),))
        checkpoints = {name: Checkpoint.open(models / name) for name in sources}
        text, _ = write_mergekit(recipe, checkpoints)
        assert all(
            torch.equal(merged(text)[name], t) for name, t in Materializer(checkpoints).stream(recipe) if "norm" in name
        )

    def test_nuslerp_of_task_vectors(self, models):
        sources = {name: Source(str(models / name)) for name in ("base", "a", "b")}
        rule = Rule("nuslerp", {"a": 0.25, "b": 0.75}, knobs={"origin": 1.0})
        text, _ = write_mergekit(
            Recipe(sources, "base", "base", (rule,)), {name: Checkpoint.open(models / name) for name in sources}
        )
        data = yaml.safe_load(text)
        assert data["base_model"].endswith("/base")
        assert [model["parameters"] for model in data["models"]] == [{"weight": 0.25}, {"weight": 0.75}]

    def test_a_density_of_one_is_said_whatever_epsilon(self, models):
        sources = {name: Source(str(models / name)) for name in ("base", "a")}
        rule = Rule("della", {"a": 0.5}, knobs={"density": 1.0, "epsilon": 0.2})
        text, _ = write_mergekit(
            Recipe(sources, "base", "base", (rule,)), {name: Checkpoint.open(models / name) for name in sources}
        )
        assert yaml.safe_load(text)["models"][0]["parameters"]["density"] == 1.0

    def test_dtypes_that_are_several(self, tmp_path):
        parent = make_checkpoint(tmp_path / "a", "llama", 0, shard="1GB")
        tensors = {name: t.float() if t.dim() == 1 else t.bfloat16() for name, t in files_of(parent).items()}
        save_file(tensors, parent / "model.safetensors", metadata={"format": "pt"})
        recipe = Recipe({"a": Source(str(parent))}, "a", "a")
        with pytest.raises(CannotSayError, match="for all tensors; these hold BF16 and F32"):
            write_mergekit(recipe, {"a": Checkpoint.open(parent)})

    def test_passthrough_scales_one_model(self, models, merged):
        rules = (Rule("passthrough", {"a": 1.0}, roles=(Role.FFN,), knobs={"scale": 0.5}),)
        recipe = Recipe({"a": Source(str(models / "a"))}, "a", "a", rules)
        text, _ = write_mergekit(recipe, {"a": Checkpoint.open(models / "a")})
        a = files_of(models / "a")
        for name, tensor in merged(text).items():
            assert torch.equal(tensor, 0.5 * a[name] if "mlp" in name else a[name])

    def test_interface_and_dtype_are_kept(self, models):
        recipe = of_space(models, "ties")
        data = yaml.safe_load(write_mergekit(recipe, {n: Checkpoint.open(models / n) for n in recipe.sources})[0])
        assert data["base_model"].endswith("/base") and data["tokenizer_source"].endswith("/a")
        assert data["dtype"] == data["out_dtype"] == "float32"

    @pytest.mark.parametrize(
        ("rules", "words"),
        [
            ((Rule("aoe", {"a": 0.5}),), "has no aoe"),
            ((Rule("linear", {"a": 0.5}, blocks=(0,)), Rule("slerp", {"a": 0.5})), "one merge_method"),
            ((Rule("slerp", {"a": 0.5, "b": 0.5}),), "takes two models"),
            ((Rule("sce", {"a": 0.5, "b": 1.0}),), "no weights"),
            ((Rule("karcher", {"a": 0.5}, blocks=(0,)),), "alike"),
            ((Rule("slerp", {"a": 0.5, "base": 0.3}),), "leaves out a donor that is the base"),
            ((Rule("dare_linear", {"a": 0.5, "base": 0.5}, knobs={"normalize": 1.0}),), "donor that is the base"),
            ((Rule("model_stock", {"a": 1.0}),), "two models or more"),
            ((Rule("della", {"a": 0.5}, knobs={"density": 0.1, "epsilon": 0.2}),), "between epsilon and 1 - epsilon"),
            ((Rule("della_linear", {"a": 0.5}, knobs={"density": 0.95, "epsilon": 0.15}),), "a's is 0.95"),
        ],
    )
    def test_what_mergekit_has_no_words_for(self, models, rules, words):
        sources = {name: Source(str(models / name)) for name in ("base", "a", "b")}
        with pytest.raises(CannotSayError, match=words):
            write_mergekit(
                Recipe(sources, "base", "a", rules), {name: Checkpoint.open(models / name) for name in sources}
            )

    def test_filters_that_would_match_elsewhere(self, models, tmp_path):
        """mergekit looks for them anywhere in a name: "norm." is in "input_layernorm.", too."""
        for name in ("base", "a"):
            folder = shutil.copytree(models / name, tmp_path / name)
            tensors = {key.removeprefix("model."): tensor for key, tensor in files_of(folder).items()}
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        rules = (
            Rule("task_arithmetic", {"a": 0.25}, tensors=("norm.weight",)), Rule("task_arithmetic", {"a": 0.75}),
        )  # fmt: skip
        sources = {name: Source(str(tmp_path / name)) for name in ("base", "a")}
        with pytest.raises(CannotSayError, match=r"filters anywhere in a name, .* leave out layers.0.input_layernorm"):
            opened = {name: Checkpoint.open(tmp_path / name) for name in sources}
            write_mergekit(Recipe(sources, "base", "a", rules), opened)

    def test_routed_experts(self, moe_parents):
        sources = {name: Checkpoint.open(path) for name, path in moe_parents.items()}
        named = {name: Source(str(path)) for name, path in moe_parents.items()}
        space = expert(sources["a"].layout, Ingredients(named, "b", ("a",), "a", "linear"))
        with pytest.raises(CannotSayError, match="experts"):
            write_mergekit(space.decode(np.full(len(space.genes), 0.5, np.float32)), sources)
