"""Checkpoints from the Hub, with huggingface_hub itself on a cache that was filled by hand; no network."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import yaml

from evo.config import ConfigError
from evo.config_file import load_config
from evo.hub import is_id, origin, recipe_sources
from search_spaces.recipe import Recipe

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "f" * 40


@pytest.fixture
def cache(moe_parents, tmp_path, monkeypatch):
    """A cache that holds two commits of org/a, the newer one called main."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "hub" / "models--org--a"
    for commit in (COMMIT, OLDER):
        shutil.copytree(moe_parents["a"], repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return repo


def config_with(tmp_path, moe_parents, parent):
    data = {
        "parents": {"a": parent, "b": str(moe_parents["b"])},
        "task": {"kind": "arithmetic"},
        "budget": {"candidates": 5},
    }
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(data))
    return load_config(tmp_path / "search.yaml")


@pytest.mark.parametrize(("parent", "commit"), [("org/a", COMMIT), (f"org/a@{OLDER}", OLDER), ("org/a@main", COMMIT)])
def test_an_id_is_its_snapshot_and_the_recipe_keeps_it(cache, moe_parents, tmp_path, parent, commit):
    config = config_with(tmp_path, moe_parents, parent)
    assert config.parents["a"] == cache / "snapshots" / commit
    sources = recipe_sources(config.sources, {"a": "digest"})
    assert (sources["a"].path, sources["a"].revision, sources["a"].digest) == ("org/a", commit, "digest")
    assert (sources["b"].path, sources["b"].revision) == (str(moe_parents["b"]), None)
    recipe = Recipe(sources, "b", "a")
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_a_folder_of_that_name_wins(cache, moe_parents, tmp_path):
    shutil.copytree(moe_parents["a"], tmp_path / "org" / "a")
    assert config_with(tmp_path, moe_parents, "org/a").parents["a"] == tmp_path / "org" / "a"


@pytest.mark.parametrize("parent", ["org/missing", "org/a@another"])
def test_offline_and_not_there(cache, moe_parents, tmp_path, parent):
    with pytest.raises(ConfigError, match=r"search\.yaml:\d+: parents\.a: no checkpoint folder at .*HF_HUB_OFFLINE"):
        config_with(tmp_path, moe_parents, parent)


def test_what_can_be_an_id():
    assert all(is_id(text) for text in ("deepseek-ai/DeepSeek-R1", "Qwen/Qwen3-0.6B@v1.0", "a/b@refs/pr/1"))
    assert not any(
        is_id(text) for text in ("name", "/models/a", "../a", "./a", "../a/b", "a/b/c", "a/b@", "~/models/x/y")
    )


def test_origin_of_a_plain_folder():
    assert origin(Path("/models/a")) == ("/models/a", None)
