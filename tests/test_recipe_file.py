"""Recipes of ours, merged from a file."""

import json

import pytest
import torch

from evo.merge_file import RecipeError, merge
from search_spaces.recipe import Recipe, Rule, Source
from tests.encoding import files_of


def test_a_file_of_ours_rebuilds_its_export(models, tmp_path):
    (models / "ours.yaml").write_text(
        json.dumps(
            {
                "version": 1, "base": "base", "interface": "a",
                "sources": {"base": {"path": "base"}, "a": {"path": "a"}},
                "rules": [{"method": "linear", "coefficients": {"a": 0.5}, "tensors": ["*.q_proj.weight"]}],
            }
        )
    )  # fmt: skip
    merge(models / "ours.yaml", tmp_path / "one")
    merge(tmp_path / "one" / "recipe.yaml", tmp_path / "two")
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    base, a = files_of(models / "base"), files_of(models / "a")
    for name in one:
        assert torch.equal(one[name], 0.5 * base[name] + 0.5 * a[name] if "q_proj" in name else base[name])


@pytest.mark.parametrize("kind", ["ours", "mergekit"])
def test_folders_that_were_found_from_here_are_found_from_anywhere(models, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(models.parent)
    said = {
        "ours": "version: 1\nsources: {a: {path: %s/a}}\nbase: a\ninterface: a\nrules: []\n",
        "mergekit": "merge_method: passthrough\nmodels: [{model: %s/a}]\ndtype: float32\n",
    }
    (tmp_path / "recipe.yaml").write_text(said[kind] % models.name)
    merge(tmp_path / "recipe.yaml", tmp_path / "one")
    monkeypatch.chdir("/")
    merge(tmp_path / "one" / "recipe.yaml", tmp_path / "two")
    assert f"path: {models}/a" in (tmp_path / "one" / "recipe.yaml").read_text()


def test_a_digest_is_checked(models, tmp_path):
    sources = {name: Source(str(models / name)) for name in ("base", "a")}
    sources["a"] = Source(sources["a"].path, "0" * 64)
    (tmp_path / "r.yaml").write_text(Recipe(sources, "base", "a", (Rule("linear", {"a": 0.5}),)).to_yaml())
    with pytest.raises(RecipeError, match=r"a: the content of .* is not what the recipe was written for"):
        merge(tmp_path / "r.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()
