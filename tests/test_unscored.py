"""What no resident model loads: DeepSeek's multi-token prediction, vision towers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from evo.adapter import open_checkpoints
from evo.assemble import notes_on
from evo.checkpoint import Checkpoint
from evo.compatible import check_compatible
from evo.materializer import Materializer
from fitness.engines.transformers import TransformersEngine
from search_spaces.layout import Role, parse_layout
from search_spaces.recipe import Recipe, Rule, Source
from tests.adapters import make_adapter
from tests.conftest import make_checkpoint
from tests.encoding import files_of, to_fp8
from tests.packing import store_head
from tests.test_materializer import exported, sources_of

MTP = "model.layers.3."  # the model has blocks 0 to 2


def with_mtp(folder, out, *, shared=True):
    """A multi-token-prediction block as DeepSeek-V3 publishes it, in a shard of its own."""
    shutil.copytree(folder, out)
    tensors = files_of(folder)
    block = {n.replace(".layers.2.", ".layers.3."): t.clone() for n, t in tensors.items() if ".layers.2." in n}
    block |= {MTP + n: torch.randn(32).bfloat16() for n in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
    block[MTP + "eh_proj.weight"] = torch.randn(32, 64).bfloat16()
    block[MTP + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * (1 if shared else 2)
    block[MTP + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(block, out / "mtp.safetensors", metadata={"format": "pt"})
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(block, "mtp.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def plain_parents(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mtp")
    made = {name: make_checkpoint(folder / name, "deepseek_v3", seed) for seed, name in enumerate(["a", "b"])}
    if request.param == "bf16":
        return made
    return {name: to_fp8(path, folder / f"{name}-fp8") for name, path in made.items()}


RULE = Rule("linear", {"a": 0.5})


def test_multi_token_prediction_comes_from_the_interface_parent(plain_parents, tmp_path):
    """A donor without it does not matter; its copies of the embedding and the head follow the merged ones."""
    parents = {**plain_parents, "a": with_mtp(plain_parents["a"], tmp_path / "a")}
    check_compatible({name: Checkpoint.open(path) for name, path in parents.items()})
    out = exported(parents, Recipe(sources_of(parents), "b", "a", (RULE,)), tmp_path / "out")
    merged, a = files_of(out), files_of(parents["a"])
    assert merged.keys() == a.keys()
    assert torch.equal(merged[MTP + "embed_tokens.weight"], merged["model.embed_tokens.weight"])
    assert torch.equal(merged[MTP + "shared_head.head.weight"], merged["lm_head.weight"])
    assert not torch.equal(merged["lm_head.weight"], a["lm_head.weight"])
    unscored = {
        name for name in a if name.startswith(MTP) and not name.endswith(("embed_tokens.weight", "head.weight"))
    }
    assert len(unscored) > 30
    for name in unscored:
        assert torch.equal(merged[name].view(torch.uint8), a[name].view(torch.uint8)), name
    AutoModelForCausalLM.from_pretrained(out) if "quantization_config" not in Checkpoint.open(out).config() else None


def test_a_copy_of_an_embedding_that_is_the_head_too_follows_the_embedding(tmp_path):
    parents = {}
    for seed, name in enumerate(["a", "b"]):
        plain = make_checkpoint(tmp_path / f"{name}0", "llama_tied", seed)
        parents[name] = store_head(plain, tmp_path / name)
    tensors = files_of(parents["a"])
    tensors["mtp.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, parents["a"] / "model.safetensors", metadata={"format": "pt"})
    rule = Rule("linear", {"a": 0.5}, roles=(Role.EMBEDDING,))
    merged = files_of(exported(parents, Recipe(sources_of(parents), "b", "a", (rule,)), tmp_path / "out"))
    for name in ("lm_head.weight", "mtp.embed_tokens.weight"):
        assert torch.equal(merged[name], merged["model.embed_tokens.weight"])
    assert not torch.equal(merged["lm_head.weight"], tensors["lm_head.weight"])


def test_an_adapter_rests_on_a_model_with_multi_token_prediction(tmp_path):
    """It has no config.json of its own that says how many blocks the model has."""
    plain = make_checkpoint(tmp_path / "plain", "deepseek_v3", 0)
    adapter, base = make_adapter(tmp_path / "lora", plain, 1), with_mtp(plain, tmp_path / "base")
    merged = {}
    for folder in (plain, base):
        opened = open_checkpoints({"base": folder, "a": adapter})
        check_compatible(opened)
        recipe = Recipe({name: Source(str(c.path)) for name, c in opened.items()}, "base", "base", (RULE,))
        merged[folder] = dict(Materializer(opened).stream(recipe))
    assert all(torch.equal(merged[base][name], tensor) for name, tensor in merged[plain].items())
    assert torch.equal(merged[base][MTP + "eh_proj.weight"], files_of(base)[MTP + "eh_proj.weight"])


def test_a_copy_that_is_none_stays_as_it_is(plain_parents, tmp_path):
    parents = {**plain_parents, "a": with_mtp(plain_parents["a"], tmp_path / "a", shared=False)}
    merged = files_of(exported(parents, Recipe(sources_of(parents), "b", "a", (RULE,)), tmp_path / "out"))
    assert torch.equal(merged[MTP + "embed_tokens.weight"], files_of(parents["a"])[MTP + "embed_tokens.weight"])


def test_a_child_has_none_if_its_interface_parent_has_none(plain_parents, tmp_path):
    parents = {**plain_parents, "a": with_mtp(plain_parents["a"], tmp_path / "a")}
    out = exported(parents, Recipe(sources_of(parents), "a", "b", (RULE,)), tmp_path / "out")
    assert files_of(out).keys() == files_of(parents["b"]).keys()


def test_the_resident_model_gets_the_rest(plain_parents, tmp_path):
    parents = {**plain_parents, "a": with_mtp(plain_parents["a"], tmp_path / "a")}
    recipe = Recipe(sources_of(parents), "b", "a", (RULE,))
    engine = TransformersEngine(str(parents["a"]), dtype="float32", device="cpu")
    engine.host("evo.materializer:Materializer.hosted", sources={n: str(p) for n, p in parents.items()})
    report = engine.update(recipe.to_dict())
    assert report.n_written == len(Checkpoint.open(parents["b"]).layout.parts)
    assert engine.generate(["1+2"], max_tokens=4)


def test_they_are_named(plain_parents, tmp_path, chimera):
    checkpoint = Checkpoint.open(with_mtp(plain_parents["a"], tmp_path / "a"))
    assert set(checkpoint.layout.unscored) == {name for name in checkpoint.entries if name.startswith(MTP)}
    assert checkpoint.layout.n_blocks == 3
    parents = {"a": checkpoint, "b": Checkpoint.open(plain_parents["b"])}
    config = chimera.model_copy(update={"parents": {n: c.path for n, c in parents.items()}, "interface": "a"})
    (note,) = notes_on(config, parents)
    assert f"{len(checkpoint.layout.unscored)} tensor(s)" in note
    assert MTP in note
    assert notes_on(config.model_copy(update={"interface": "b"}), parents) == []


def test_vision_towers_and_projectors_are_unscored():
    names = {
        "model.visual.blocks.0.attn.qkv.weight": (8, 8),
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8),
        "multi_modal_projector.linear_1.weight": (8, 8),
        "mtp.layers.0.mlp.gate.weight": (8, 8),
        "model.layers.0.self_attn.rotary_emb.inv_freq": (8,),
    }
    layout = parse_layout({**names, "model.layers.0.self_attn.q_proj.weight": (8, 8)})
    assert layout.unscored == tuple(names)
    assert [part.tensor for part in layout.parts] == ["model.layers.0.self_attn.q_proj.weight"]
