"""MODEL+ADAPTER in mergekit's YAML: a model with a LoRA, which is a source of its own beside the model."""

import numpy as np
import pytest
import torch
import yaml

from evo.checkpoint import CheckpointError
from evo.merge_file import merge
from search_spaces.recipe import Recipe
from tests.adapters import expected_of, make_adapter
from tests.encoding import files_of
from tests.test_export import hashes

SCALE = 6 / 4
HALF = "parameters: {weight: 0.5}\n"


@pytest.fixture(scope="module", autouse=True)
def adapters(models):
    """On a: one and two."""
    for seed, name in enumerate(("one", "two")):
        make_adapter(models / name, models / "a", seed)


def values(models, model, adapter=None):
    """Float64 values of a model with an adapter."""
    if adapter is not None:
        return expected_of(models / model, models / adapter, lambda module: SCALE)
    return {name: tensor.double().numpy() for name, tensor in files_of(models / model).items()}


def assert_merged(found, expected):
    for name, tensor in found.items():
        assert np.allclose(tensor.numpy(), expected[name], rtol=1e-5, atol=2e-6 * np.abs(expected[name]).max()), name


@pytest.mark.parametrize(
    ("base", "donor"),
    [
        (("a", None), ("a", "one")),
        (("base", None), ("a", "one")),  # rests on another model than the base
        (("a", "two"), ("b", None)),
        (("a", "two"), ("a", "one")),
        (("b", "one"), ("a", "one")),  # one adapter on two models
    ],
)
def test_a_model_with_an_adapter(models, merged, base, donor):
    told = ["+".join(filter(None, pair)) for pair in (base, donor)]
    found = merged(f"merge_method: task_arithmetic\nbase_model: {told[0]}\nmodels: [{{model: {told[1]}}}]\n{HALF}")
    ours, theirs = values(models, *base), values(models, *donor)
    assert_merged(found, {name: 0.5 * ours[name] + 0.5 * theirs[name] for name in ours})


def test_methods_without_a_base(models, merged):
    found = merged(f"merge_method: linear\nmodels: [{{model: a+one}}, {{model: a+two}}, {{model: b}}]\n{HALF}")
    three = [values(models, "a", "one"), values(models, "a", "two"), values(models, "b")]
    assert_merged(found, {name: sum(v[name] for v in three) / 3 for name in three[0]})
    assert_merged(merged("merge_method: passthrough\nmodels: [{model: a+one}]"), three[0])


def test_mappings_as_mergekit_writes_them(models, merged):
    text = f"merge_method: task_arithmetic\nbase_model: base\n{HALF}models: [{{model: %s}}]"
    one = merged(text % "a+one")
    for mapping in ("{lora: one, model: a}", "{model: {path: a}, lora: {path: one}}", "{model: a+one}"):
        assert all(torch.equal(one[name], tensor) for name, tensor in merged(text % mapping).items())


def test_the_tokenizer_is_the_models_and_the_recipe_rebuilds_it(models, tmp_path):
    text = f"merge_method: task_arithmetic\nbase_model: a+two\n{HALF}models: [{{model: a+one}}, {{model: b+one}}]\n"
    (models / "recipe.yaml").write_text(text)
    merge(models / "recipe.yaml", tmp_path / "out")
    recipe = Recipe.from_yaml((tmp_path / "out" / "recipe.yaml").read_text())
    assert (recipe.base, recipe.interface) == ("two", "a")
    assert {name: source.rests_on for name, source in recipe.sources.items()} == {
        "a": None, "two": "a", "one": "a", "b": None, "one_2": "b",
    }  # fmt: skip
    for file in ("recipe.yaml", "mergekit.yaml"):
        merge(tmp_path / "out" / file, tmp_path / file)
        assert hashes(tmp_path / file) == hashes(tmp_path / "out")
    written = yaml.safe_load((tmp_path / "out" / "mergekit.yaml").read_text())
    assert [entry["model"] for entry in written["models"]] == [f"{models}/a+{models}/one", f"{models}/b+{models}/one"]
    other = recipe.to_dict()
    other["sources"]["one_2"]["rests_on"] = "a"
    assert Recipe.from_dict(other).digest != recipe.digest


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("a+b", "b .*expected a LoRA adapter of a"),
        ("one+two", "two .*is a LoRA adapter: expected the full checkpoint .* as one"),
    ],
)
def test_what_is_no_adapter_of_a_model(models, tmp_path, model, words):
    (models / "recipe.yaml").write_text(
        f"merge_method: task_arithmetic\nbase_model: base\nmodels: [{{model: {model}}}]\n{HALF}"
    )
    with pytest.raises(CheckpointError, match=words):
        merge(models / "recipe.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_rests_on_one_that_is_there(models):
    data = {"version": 1, "base": "a", "interface": "a", "sources": {"a": {"path": "a", "rests_on": "b"}}, "rules": []}
    with pytest.raises(ValueError, match="no source is called 'b'"):
        Recipe.from_dict(data)
