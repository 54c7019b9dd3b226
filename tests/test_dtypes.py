"""Merges stored in another dtype than their parents, and merges of parents that are stored in several."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evo.checkpoint import CheckpointError
from evo.merge.kernels import OFF
from evo.merge_file import RecipeError, merge
from search_spaces.recipe import Recipe
from tests.adapters import make_adapter
from tests.conftest import CONFIGS, make_checkpoint
from tests.encoding import files_of, to_fp8

BIAS = "e_score_correction_bias"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of one architecture: checkpoints called "bfloat16", "float16" and "float32", after what they are stored in."""
    folder = tmp_path_factory.mktemp("dtypes")
    config = CONFIGS["deepseek_v3"]()
    config.vocab_size = 4000  # an embedding that a loop is compiled for
    for seed, (name, dtype) in enumerate(DTYPES.items()):
        make_checkpoint(folder / name, config, seed, dtype=dtype)
    return folder


@pytest.fixture
def merged(folder, tmp_path):
    """Merges what a recipe beside the checkpoints says."""

    def run(recipe, out="out"):
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        merge(folder / "recipe.yaml", tmp_path / out, force=True)
        return files_of(tmp_path / out)

    return run


def recipe_of(names, rules, **further):
    sources = {name: {"path": name} for name in names}
    return {"version": 1, "sources": sources, "base": names[0], "interface": names[0], "rules": rules, **further}


def add(parent, tensors):
    """Write tensors into a checkpoint, in a shard of their own."""
    save_file(tensors, parent / "more.safetensors")
    index = json.loads((parent / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "more.safetensors")
    (parent / "model.safetensors.index.json").write_text(json.dumps(index))


def rounded(values, dtype):
    """Each number to the nearest of a dtype, but for biases, which stay float32."""
    return {name: value if name.endswith(BIAS) else value.to(dtype) for name, value in values.items()}


def assert_same(found, expected):
    """In numbers and in dtype, of which torch.equal knows nothing."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def assert_rounded_once(found, exact):
    """To the nearest of its dtype, from what float32 makes of numbers of about 1."""
    half_a_step = torch.finfo(found.dtype).eps / 2 * exact.abs().clamp(min=torch.finfo(found.dtype).tiny)
    on_the_way = 4 * torch.finfo(torch.float32).eps
    assert ((found.double() - exact).abs() <= half_a_step * 1.001 + on_the_way).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("base", DTYPES)
def test_a_merge_is_rounded_once_to_the_dtype_that_is_asked_for(folder, merged, monkeypatch, base, dtype, compiled):
    if not compiled:
        monkeypatch.setenv(OFF, "1")
    names = [base, *(name for name in DTYPES if name != base)]
    found = merged(
        recipe_of(names, [{"method": "linear", "coefficients": {names[1]: 0.25, names[2]: 0.5}}], dtype=dtype)
    )
    a, b, c = (files_of(folder / name) for name in names)
    exact = {n: 0.25 * a[n].double() + 0.25 * b[n].double() + 0.5 * c[n].double() for n in a}
    assert found.keys() == exact.keys()
    for name, tensor in found.items():
        assert tensor.dtype == (torch.float32 if name.endswith(BIAS) else DTYPES[dtype])
        assert_rounded_once(tensor, exact[name])


def test_all_dtypes_are_of_one_merge(merged):
    """None of them goes through another."""
    ties = {"method": "ties", "coefficients": {"float32": 0.6, "bfloat16": 0.7}, "knobs": {"density": 0.4}}
    names = ["float16", "float32", "bfloat16"]
    whole, *others = (merged(recipe_of(names, [ties], dtype=dtype), dtype) for dtype in DTYPES)
    for other, dtype in zip(others, list(DTYPES.values())[1:], strict=True):
        for name, value in rounded(whole, dtype).items():
            assert_same(other[name], value)


def test_copies_are_converted_and_plain_transformers_loads_them(folder, merged, tmp_path):
    found = merged(recipe_of(["bfloat16"], [], dtype="float16"))
    for name, value in rounded(files_of(folder / "bfloat16"), torch.float16).items():
        assert_same(found[name], value)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.float16
    assert torch.equal(loaded.lm_head.weight, found["lm_head.weight"])


def test_what_is_stored_so_already_stays_as_it_is(folder, merged):
    found = merged(recipe_of(["float16"], [], dtype="float16"))
    for name, value in files_of(folder / "float16").items():
        assert_same(found[name], value)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, {"dtype": "float16"}),
        ({"dtype": None}, {"dtype": "float16"}),
        ({"dtype": "bfloat16"}, {"dtype": "float16"}),
        ({"dtype": "float64"}, {"dtype": "float16"}),
        ({"torch_dtype": "torch.float32"}, {"torch_dtype": "float16"}),
        ({"text_config": {"dtype": "bfloat16"}}, {"text_config": {"dtype": "float16"}, "dtype": "float16"}),
        ({"dtype": {"text_config": "bfloat16"}}, {"dtype": {"text_config": "bfloat16"}}),
    ],
)
def test_config_json_says_the_dtype_that_is_asked_for(folder, merged, tmp_path, said, expected):
    """Whatever it said of the same numbers before, or did not."""
    config = json.loads((folder / "float16" / "config.json").read_text())
    del config["dtype"]
    shutil.copytree(folder / "float16", tmp_path / "parent")
    (tmp_path / "parent" / "config.json").write_text(json.dumps({**config, **said}))
    merged({**recipe_of(["parent"], [], dtype="float16"), "sources": {"parent": {"path": str(tmp_path / "parent")}}})
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**config, **expected}


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_what_is_usual_is_what_most_numbers_have_that_generate_text(folder, merged, tmp_path, dtype):
    """Not most tensors, nor those of a tower for images, of which this one has more than the model."""
    parent = shutil.copytree(folder / "bfloat16", tmp_path / "parent")
    for file in parent.glob("*.safetensors"):
        tensors = {name: t.float() if t.dim() == 1 else t for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    tower = {f"visual.{i}.weight": torch.arange(2000 + i, dtype=dtype) for i in range(400)}
    add(parent, tower)
    found = merged({**recipe_of(["parent"], [], dtype="float16"), "sources": {"parent": {"path": str(parent)}}})
    assert found["lm_head.weight"].dtype == torch.float16 and found["model.norm.weight"].dtype == torch.float32
    for name, value in tower.items():
        assert_same(found[name], value)


def test_what_is_copied_from_one_parent_is_not_stored_as_in_another(folder, merged, tmp_path):
    sources = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float32)):
        sources[name] = {"path": str(shutil.copytree(folder / name, tmp_path / name))}
        add(tmp_path / name, {"visual.weight": torch.full((3,), 1 / 3, dtype=dtype)})
    found = merged({**recipe_of(["bfloat16", "float16"], [], dtype="float16"), "sources": sources})["visual.weight"]
    assert_same(found, torch.full((3,), 1 / 3, dtype=torch.bfloat16).half())


def test_what_stays_quantised_is_said_to_be(folder, merged, tmp_path):
    """Though biases get the dtype that they have in another parent."""
    parent = shutil.copytree(folder / "bfloat16", tmp_path / "parent")
    for file in parent.glob("*.safetensors"):
        tensors = {name: t.bfloat16() for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    sources = {"a": {"path": str(to_fp8(parent, tmp_path / "a"))}}
    sources["b"] = {"path": str(to_fp8(folder / "bfloat16", tmp_path / "b"))}
    rules = [{"method": "linear", "coefficients": {"b": 0.5}}]
    found = merged({**recipe_of("ab", rules, dtype="bfloat16"), "sources": sources})
    assert {t.dtype for name, t in found.items() if name.endswith(BIAS)} == {torch.float32}
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "a", tmp_path / "out"))
    assert after == before and "quantization_config" in after


def test_an_exports_recipe_has_the_same_bits(folder, merged, tmp_path):
    rule = {"method": "linear", "coefficients": {"float16": 0.5}, "roles": ["ffn"]}
    found = merged(recipe_of(["bfloat16", "float16"], [rule], dtype="bfloat16"))
    merge(tmp_path / "out" / "recipe.yaml", tmp_path / "again")
    again = files_of(tmp_path / "again")
    assert_same(found, again)
    assert Recipe.from_yaml((tmp_path / "again" / "recipe.yaml").read_text()).dtype == "bfloat16"
    assert "Stored as bfloat16." in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize("keys", [{"dtype": "float16"}, {"dtype": "float32", "out_dtype": "torch.float16"}])
def test_mergekits_key(folder, tmp_path, keys):
    for seed, (name, dtype) in enumerate({"a": torch.bfloat16, "b": torch.float32}.items()):
        make_checkpoint(tmp_path / name, "llama", seed, dtype=dtype)
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in "ab"]
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models, **keys}))
    merge(tmp_path / "m.yaml", tmp_path / "out")
    a, b, found = (files_of(tmp_path / name) for name in ("a", "b", "out"))
    for name, tensor in found.items():
        assert tensor.dtype == torch.float16
        assert_rounded_once(tensor, 0.5 * a[name].double() + 0.5 * b[name].double())
    written = yaml.safe_load((tmp_path / "out" / "mergekit.yaml").read_text())
    assert (written["dtype"], written["out_dtype"]) == ("float32", "float16")


def test_an_adapter_follows_its_base(tmp_path):
    base = make_checkpoint(tmp_path / "base", "llama", 0)
    make_adapter(tmp_path / "lora", base, 1)
    text = yaml.safe_dump(recipe_of(["base", "lora"], [{"method": "linear", "coefficients": {"lora": 1.0}}]))
    for dtype in ("float32", "float16"):
        (tmp_path / "recipe.yaml").write_text(f"{text}\ndtype: {dtype}\n")
        merge(tmp_path / "recipe.yaml", tmp_path / dtype)
    whole, half = files_of(tmp_path / "float32"), files_of(tmp_path / "float16")
    assert {t.dtype for t in whole.values()} == {torch.float32} and {t.dtype for t in half.values()} == {torch.float16}
    for name, value in whole.items():
        assert_same(half[name], value.half())


class TestRefused:
    def test_parents_of_several_dtypes_without_one(self, merged):
        with pytest.raises(CheckpointError, match="takes several, if its file says `dtype: bfloat16`"):
            merged(recipe_of(["bfloat16", "float16"], []))

    @pytest.mark.parametrize("rules", [[], [{"method": "linear", "coefficients": {"large": 0.5}}]])
    def test_numbers_that_the_dtype_has_not(self, tmp_path, rules):
        for seed, name in enumerate(["small", "large"]):
            make_checkpoint(tmp_path / name, "llama", seed, shard="1GB")
        tensors = files_of(tmp_path / "large")
        tensors["model.norm.weight"][3] = 1e6  # float16 ends at 65504
        save_file(tensors, tmp_path / "large" / "model.safetensors", metadata={"format": "pt"})
        names = ["small", "large"] if rules else ["large"]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(names, rules, dtype="float16")))
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight: .* range of"):
            merge(tmp_path / "recipe.yaml", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_what_is_quantised(self, folder, merged):
        to_fp8(folder / "bfloat16", folder / "fp8")
        with pytest.raises(CheckpointError, match=r"is stored as F8_E4M3 .*no dtype, or .* \(BF16\), got float32"):
            merged(recipe_of(["fp8"], [], dtype="float32"))
        assert merged(recipe_of(["fp8"], [], dtype="bfloat16"))  # as its other tensors are anyway
        with pytest.raises(CheckpointError, match=r"F8_E4M3 with scales(?s:.*)with the dtype of the others\.$"):
            merged(recipe_of(["fp8", "bfloat16"], [], dtype="bfloat16"))  # and is told nothing of dtypes

    def test_a_dtype_that_is_not_here(self, merged):
        with pytest.raises(RecipeError, match="dtype: expected one of float32, float16, bfloat16, or none, got 'int8'"):
            merged(recipe_of(["bfloat16"], [], dtype="int8"))
