"""Which checkpoints can be merged, and what is said of the others."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from evo.assemble import notes_on, open_sources
from evo.checkpoint import Checkpoint, CheckpointError
from evo.compatible import check_compatible, differing_settings
from evo.merge_file import merge
from tests.conftest import make_checkpoint
from tests.encoding import first_shard


def test_siblings_pass(parents):
    check_compatible({name: Checkpoint.open(path) for name, path in parents.items()})


def test_all_differences_are_listed(moe_parents, copy):
    shard = first_shard(copy)
    tensors = load_file(shard)
    name = next(iter(tensors))
    tensors[name] = tensors[name].float()
    save_file(tensors, shard, metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 999}))
    with pytest.raises(CheckpointError) as error:
        check_compatible({"a": Checkpoint.open(moe_parents["a"]), "odd": Checkpoint.open(copy)})
    assert f"{name}: BF16" in str(error.value)
    assert "vocab_size" in str(error.value)
    assert "2 difference(s)" in str(error.value)


def test_another_architecture(moe_parents, tmp_path):
    other = make_checkpoint(tmp_path / "llama", "llama", 0)
    with pytest.raises(CheckpointError, match="model_type: 'deepseek_v3' in a, 'llama' in b"):
        check_compatible({"a": Checkpoint.open(moe_parents["a"]), "b": Checkpoint.open(other)})


@pytest.mark.parametrize(("key", "value"), [("num_attention_heads", 4), ("head_dim", 8), ("hidden_act", "gelu")])
def test_weights_that_mean_something_else(copy, moe_parents, key, value):
    config = json.loads((copy / "config.json").read_text())
    other = {"num_attention_heads": 2, "head_dim": 16, "hidden_act": "silu"}[key]
    sibling = Path(shutil.copytree(moe_parents["a"], copy.parent / "sibling"))
    (copy / "config.json").write_text(json.dumps({**config, key: value}))
    (sibling / "config.json").write_text(json.dumps({**config, key: other}))
    with pytest.raises(CheckpointError, match=f"config.json {key}"):
        check_compatible({"a": Checkpoint.open(sibling), "b": Checkpoint.open(copy)})


def test_another_vocabulary(moe_parents, copy):
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace('"7":', '"seven":'))
    with pytest.raises(CheckpointError, match="'7', 'seven'"):
        check_compatible({"a": Checkpoint.open(moe_parents["a"]), "b": Checkpoint.open(copy)})


@pytest.fixture
def settings_of(moe_parents, copy):
    """Two checkpoints, the second with other settings."""

    def opened(**settings):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, **settings}))
        return {"a": Checkpoint.open(moe_parents["a"]), "b": Checkpoint.open(copy)}

    return opened


def test_settings_that_differ_silently_are_told(settings_of):
    pair = settings_of(rms_norm_eps=1e-3, transformers_version="1.2.3", initializer_range=0.5)
    check_compatible(pair)
    (note,) = differing_settings(pair, "b")
    assert note == "config.json rms_norm_eps: 1e-06 in a, 0.001 in b; merges get that of 'b'"


def test_nothing_is_told_of_equal_settings(settings_of):
    assert differing_settings(settings_of(), "a") == []


def test_a_merge_and_a_search_tell_them(settings_of, copy, moe_parents, tmp_path, chimera):
    settings_of(rms_norm_eps=1e-3)
    (tmp_path / "recipe.yml").write_text(
        f"merge_method: linear\nmodels: [{{model: {moe_parents['a']}, parameters: {{weight: 1}}}}, "
        f"{{model: {copy}, parameters: {{weight: 1}}}}]\ndtype: bfloat16\n"
    )
    assert any("rms_norm_eps" in line for line in merge(tmp_path / "recipe.yml", tmp_path / "out").lines)
    parents = {"a": moe_parents["a"], "b": copy}
    config = chimera.model_copy(update={"parents": parents, "base": None, "interface": "a"})
    assert any("rms_norm_eps" in note for note in notes_on(config, open_sources(config)))
