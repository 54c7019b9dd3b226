"""gpt-oss's MXFP4 against the tables of the OCP specification and transformers' own decoding."""

import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig

from evo.checkpoint import Checkpoint, CheckpointError
from evo.compatible import check_compatible
from evo.encodings import mxfp4
from evo.encodings.mxfp4 import values_of
from evo.materializer import Materializer
from evo.residency import Residency
from evo.shards import Shard
from fitness.engines.transformers import TransformersEngine
from search_spaces.recipe import Recipe, Rule
from tests.conftest import VOCABULARY, tiny_tokenizer
from tests.encoding import E2M1, files_of
from tests.test_materializer import copy_of, exported, sources_of


def decode(blocks, scales):
    """OCP Microscaling Formats v1.0, tables 5 and 7; numpy, one byte after the other."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], -1)
    values = np.where(codes & 8, -1.0, 1.0) * np.array(E2M1)[codes & 7]
    values = values * 2.0 ** (scales.astype(np.float64) - 127)[..., None]
    return values.reshape(*blocks.shape[:-2], -1).swapaxes(-1, -2)


def make_gpt_oss(folder, seed, *, packed):
    """A tiny gpt-oss: experts in MXFP4 as published, or all of it in bfloat16."""
    torch.manual_seed(seed)
    config = GptOssConfig(
        vocab_size=len(VOCABULARY), hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors = {}
    for name, tensor in files_of(folder).items():
        if name.endswith("_proj") and ".experts." in name:
            n_experts, n_in, n_out = tensor.shape
            blocks = torch.randint(0, 256, (n_experts, n_out, n_in // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, (n_experts, n_out, n_in // 32), dtype=torch.uint8)
            if packed:
                tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            else:
                tensors[name] = torch.from_numpy(decode(blocks.numpy(), scales.numpy())).bfloat16().contiguous()
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if packed:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oss")
    return {name: make_gpt_oss(folder / name, seed, packed=True) for seed, name in enumerate(["a", "b"])}


def test_every_code_under_every_scale():
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16).repeat(253, 1, 1, 1)
    scales = torch.arange(253, dtype=torch.uint8).view(253, 1, 1).expand(253, 16, 1)
    expected = decode(blocks.numpy(), scales.numpy())
    assert np.array_equal(values_of(blocks, scales).double().numpy(), expected)  # exactly, in bfloat16
    assert torch.isnan(values_of(blocks[:1], torch.full((1, 16, 1), 255, dtype=torch.uint8))).all()


def test_agrees_with_transformers():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 8, 2), dtype=torch.uint8)
    ours = values_of(blocks, scales)
    assert ours.shape == (3, 64, 8)
    assert torch.equal(ours, convert_moe_packed_tensors(blocks, scales))


def test_a_packed_expert_is_one_part(parents):
    layout = Checkpoint.open(parents["a"]).layout
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert [p.expert for p in layout.parts if p.tensor == name] == [0, 1, 2, 3]
    assert Checkpoint.open(parents["a"]).entries[name].shape == (4, 64, 64)


@pytest.mark.parametrize("coefficient", [0.0, 0.25])
def test_is_written_as_bfloat16_that_transformers_loads(parents, coefficient, tmp_path):
    recipe = Recipe(sources_of(parents), "b", "a", (Rule("linear", {"a": coefficient}),))
    out = exported(parents, recipe, tmp_path / "out")
    a, b, merged = files_of(parents["a"]), files_of(parents["b"]), files_of(out)
    for name in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
        values = [decode(f[f"{name}_blocks"].numpy(), f[f"{name}_scales"].numpy()).astype(np.float32) for f in (a, b)]
        expected = np.float32(coefficient) * values[0] + np.float32(1 - coefficient) * values[1]
        assert torch.equal(merged[name], torch.from_numpy(expected).bfloat16())
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    engine = TransformersEngine(str(parents["a"]), dtype="bfloat16", device="cpu")
    engine.host("evo.materializer:Materializer.hosted", sources={n: str(p) for n, p in parents.items()})
    engine.update(recipe.to_dict())
    reloaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    for name, tensor in reloaded.state_dict().items():
        assert torch.equal(engine._model.state_dict()[name], tensor), name
    assert engine.generate(["1+2"], max_tokens=3)


@pytest.mark.parametrize("residency", [Residency.DEVICE, Residency.DISK])
def test_what_is_decoded_does_not_outlast_its_merge(parents, residency, monkeypatch):
    """Of 4.25 bits a number is kept; bfloat16 takes 16. Sources that stay on the device are read once."""
    made, decoded = [], mxfp4.values_of

    def watched(*pieces):
        values = decoded(*pieces)
        made.append(weakref.ref(values))
        return values

    monkeypatch.setattr(mxfp4, "values_of", watched)
    sources = {name: Checkpoint.open(path) for name, path in parents.items()}
    slots = {n: torch.full(e.shape, torch.nan).bfloat16() for n, e in sources["a"].scored.items()}
    writer = Materializer(sources, slots, residency=residency)
    for rules in ((Rule("linear", {"a": 0.3}),), (Rule("linear", {"a": 0.6}),), ()):  # the last is a copy of the base
        writer.write(Recipe(sources_of(parents), "b", "a", rules).to_dict())
        assert not [values for values in made if values() is not None]
    n_experts = sum(sources["a"].entries[part.tensor].encoding == mxfp4.Mxfp4() for part in writer.layout.parts)
    assert len(made) == n_experts * (2 + 2 + 1) and len(writer._reader._there) == 2 * len(writer.layout.parts)
    expected = dict(Materializer(sources).stream(Recipe(sources_of(parents), "b", "a", ())))
    assert all(torch.equal(slots[name], expected[name].view_as(slots[name])) for name in slots)


def test_merges_with_a_bfloat16_sibling(parents, tmp_path):
    mixed = {**parents, "plain": make_gpt_oss(tmp_path / "plain", 2, packed=False)}
    check_compatible({name: Checkpoint.open(path) for name, path in mixed.items()})
    out = files_of(exported(mixed, copy_of("plain", sources_of(mixed), "a"), tmp_path / "out"))
    plain = files_of(mixed["plain"])
    assert out.keys() == plain.keys()
    assert all(torch.equal(out[name], plain[name]) for name in plain)


def test_shards_are_whole_groups(parents):
    name, sources = "model.layers.1.mlp.experts.gate_up_proj", {n: Checkpoint.open(p) for n, p in parents.items()}
    recipe = Recipe(sources_of(parents), "b", "a", (Rule("linear", {"a": 0.3}),))
    expected = dict(Materializer(sources).stream(recipe))[name]
    shard = Shard(torch.empty(32, 11).bfloat16(), slice(32, 64), slice(5, 16), expert=2)
    Materializer(sources, {name: [shard]}, partial=True).write(recipe.to_dict())
    assert torch.equal(shard.slot, expected[2, 32:, 5:16])
    with pytest.raises(CheckpointError, match="multiples of 32 rows"):
        Materializer(sources, {name: [Shard(torch.empty(16, 64), slice(0, 16), expert=0)]}, partial=True)


@pytest.mark.parametrize("shape", [(), (16,), (2, 16), (2, 3, 8)])
def test_blocks_of_an_odd_shape_are_refused(tmp_path, shape):
    tensors = {
        "w_blocks": torch.zeros(shape, dtype=torch.uint8),
        "w_scales": torch.zeros(shape[:-1], dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"w: expected _blocks of shape"):
        Checkpoint.open(tmp_path)


def test_scales_that_do_not_fit_are_refused(parents, tmp_path):
    folder = shutil.copytree(parents["a"], tmp_path / "odd")
    tensors = files_of(folder)
    del tensors["model.layers.0.mlp.experts.down_proj_scales"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj: expected _blocks of shape"):
        Checkpoint.open(folder)


def test_a_scale_that_stands_for_nan(parents, tmp_path):
    """Code 255 of E8M0 (OCP Microscaling Formats v1.0, section 5.4.1)."""
    sick = shutil.copytree(parents["a"], tmp_path / "sick")
    tensors = files_of(sick)
    name = next(name for name in tensors if name.endswith("_scales"))
    tensors[name][-1, -1, -1] = 255
    save_file(tensors, sick / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(sick)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {name} holds NaN"):
        checkpoint.stored(name.removesuffix("_scales"))
    assert checkpoint.stored(name.removesuffix("_scales").replace(".0.", ".1."))
