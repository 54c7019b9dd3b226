"""LoRA adapters as donors, against W + alpha / r * B @ A in float64 (arXiv 2106.09685, section 4.1)."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from evo.adapter import Adapter, open_checkpoints
from evo.assemble import open_sources
from evo.checkpoint import Checkpoint, CheckpointError
from evo.compatible import check_compatible
from evo.config import Config
from evo.encodings.low_rank import fixed_point, power_of_two
from evo.export import write_checkpoint
from evo.materializer import Materializer
from evo.shards import Shard
from fitness.engines.transformers import TransformersEngine
from search_spaces.recipe import Recipe, Rule
from tests.adapters import RANK, expected_of, make_adapter
from tests.conftest import make_checkpoint
from tests.encoding import files_of, to_fp8, values_in
from tests.packing import store_head
from tests.test_materializer import copy_of, sources_of


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("base") / "base", "llama", 0)


def read(base, adapter):
    return open_checkpoints({"base": base, "lora": adapter})["lora"]


def assert_close(checkpoint, expected):
    assert checkpoint.entries.keys() == expected.keys()
    for name, value in expected.items():
        operand = checkpoint.stored(name).operand
        ours = operand[slice(None), slice(None)].double().numpy().reshape(value.shape)
        assert np.abs(ours - value).max() <= 2e-6 * np.abs(value).max(), name


@pytest.mark.parametrize(
    ("settings", "scale_of"),
    [
        ({}, lambda module: 6 / 4),
        ({"use_rslora": True}, lambda module: 6 / math.sqrt(4)),
        ({"rank_pattern": {"q_proj": 2}}, lambda module: 6 / (2 if module.endswith("q_proj") else 4)),
        (
            {"alpha_pattern": {r"layers\.1\.mlp\.down_proj": 10}},
            lambda module: (10 if module.endswith("1.mlp.down_proj") else 6) / 4,
        ),
    ],
)
def test_an_adapter_is_its_base_and_a_scaled_product(base, settings, scale_of, tmp_path):
    adapter = make_adapter(tmp_path / "lora", base, 1, **settings)
    assert_close(read(base, adapter), expected_of(base, adapter, scale_of))


def test_reading_changes_nothing(base, tmp_path):
    """Factors in float64 are the file's own memory."""
    adapter = make_adapter(tmp_path / "lora", base, 1)
    factors = files_of(adapter)
    save_file({k: t.double() for k, t in factors.items()}, adapter / "adapter_model.safetensors")
    checkpoint, expected = read(base, adapter), expected_of(base, adapter, lambda module: 6 / 4)
    for _ in range(2):
        assert_close(checkpoint, expected)


def test_fan_in_fan_out(base, tmp_path):
    """The weight is stored (in, out), as in GPT-2: a square one shows that the product is transposed."""
    adapter = make_adapter(tmp_path / "lora", base, 1)
    tensors = {k: t for k, t in files_of(adapter).items() if "0.self_attn.q_proj" in k}
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": True}))
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b = (next(t for k, t in tensors.items() if f"lora_{side}" in k).double() for side in "AB")
    ours = read(base, adapter).stored(name).operand[:, :]
    torch.testing.assert_close(ours.double(), files_of(base)[name].double() + 1.5 * (b @ a).T, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 24))
def test_products_have_the_same_bits_in_any_blocks_and_any_order(seed, n, rank):
    generator = torch.Generator().manual_seed(seed)
    left = fixed_point(torch.randn(n, rank, generator=generator) * 10 ** torch.randn(n, 1, generator=generator), 1)
    right = fixed_point(torch.randn(rank, n, generator=generator), 0)
    left, right = left.double(), right.double()
    whole, order = left @ right, torch.randperm(rank, generator=generator)
    assert torch.equal(whole, left[:, order] @ right[order])
    assert torch.equal(whole, torch.stack([sum(x * y for x, y in zip(row, right, strict=True)) for row in left]))
    assert torch.equal(whole[n // 2], left[n // 2] @ right)


def test_fixed_point_scales_by_powers_of_two_that_no_library_computes():
    exponents = torch.arange(-1022, 1024, dtype=torch.int32)
    assert power_of_two(exponents).tolist() == [2.0**exponent for exponent in exponents.tolist()]


def test_fixed_point_is_close():
    x = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    error = (fixed_point(x, 1) - x.double()).abs().amax(1)
    assert (error <= 2.0**-21 * x.abs().amax(1)).all()
    assert not fixed_point(torch.zeros(2, 3), 1).any()


@pytest.mark.parametrize("encoding", ["bf16", "fp8"])
def test_two_adapters_merge_like_task_vectors(base, encoding, tmp_path):
    """Scored equals exported, and both are base + sum of scaled products, rounded once."""
    base = base if encoding == "bf16" else to_fp8(base, tmp_path / "fp8")
    folders = {"base": base} | {n: make_adapter(tmp_path / n, base, seed) for seed, n in enumerate(["a", "b"], 1)}
    sources = open_checkpoints(folders)
    check_compatible(sources)
    rule = Rule("task_arithmetic", {"a": 0.5, "b": 0.25})
    recipe = Recipe(sources_of(folders), "base", "base", (rule,))
    write_checkpoint(recipe, sources, tmp_path / "out")
    merged, start = values_in(tmp_path / "out"), values_in(base)
    a, b = (expected_of(base, folders[name], lambda module: 1.5) for name in "ab")
    for name, value in merged.items():
        exact = start[name] + 0.5 * (a[name] - start[name]) + 0.25 * (b[name] - start[name])
        step = 2.0**-8 if encoding == "bf16" else 2.0**-4
        assert np.abs(value - exact).max() <= step * np.abs(exact).max(), name
    engine = TransformersEngine(str(base), dtype="float32", device="cpu")
    engine.host("evo.materializer:Materializer.hosted", sources={n: str(p) for n, p in folders.items()})
    engine.update(recipe.to_dict())
    for name, value in merged.items():
        assert torch.equal(engine.slots()[name], torch.from_numpy(value)), name


def test_a_copy_of_an_adapter_is_merge_and_unload(base, tmp_path):
    folders = {"base": base, "lora": make_adapter(tmp_path / "lora", base, 1)}
    expected = expected_of(base, folders["lora"], lambda module: 1.5)
    for name, tensor in Materializer(open_checkpoints(folders)).stream(copy_of("lora", sources_of(folders), "base")):
        torch.testing.assert_close(tensor, torch.from_numpy(expected[name]).to(tensor.dtype), rtol=2**-7, atol=1e-6)


def test_base_bits_are_held_once(base, tmp_path):
    folders = {"base": base, "lora": make_adapter(tmp_path / "lora", base, 1)}
    slots = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in files_of(base).items()}
    materializer = Materializer(open_checkpoints(folders), slots)
    recipe = Recipe(sources_of(folders), "base", "base", (Rule("task_arithmetic", {"lora": 0.5}),))
    materializer.write(recipe.to_dict())
    held = [name for _, name, _ in materializer._pieces._kept]
    assert sorted(name for name in held if not name.endswith((".left", ".right"))) == sorted(slots)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_shards_read_their_part_of_the_factors(base, name, tmp_path):
    folders = {"base": base, "lora": make_adapter(tmp_path / "lora", base, 1)}
    recipe = Recipe(sources_of(folders), "base", "base", (Rule("task_arithmetic", {"lora": 0.5}),))
    expected = dict(Materializer(open_checkpoints(folders)).stream(recipe))[name]
    shard = Shard(torch.empty_like(expected[3:20, 5:]), slice(3, 20), slice(5, None))
    Materializer(open_checkpoints(folders), {name: [shard]}, partial=True).write(recipe.to_dict())
    assert torch.equal(shard.slot, expected[3:20, 5:])


def test_weights_that_were_trained_in_full_replace_the_bases(base, tmp_path):
    norm = torch.randn(32).bfloat16()
    adapter = make_adapter(tmp_path / "lora", base, 1, extra={"base_model.model.model.norm.weight": norm})
    assert torch.equal(read(base, adapter).stored("model.norm.weight").pieces[0], norm)


def test_an_embedding_that_is_saved_beside_its_factors(base, tmp_path):
    """As peft does it when embeddings are among the targets: the difference goes on top of what is saved."""
    name = "model.embed_tokens.weight"
    other = files_of(base)[name] * 2
    extra = {"base_model.model.model.embed_tokens.base_layer.weight": other}
    plain = read(base, make_adapter(tmp_path / "plain", base, 1)).stored(name).operand
    ours = read(base, make_adapter(tmp_path / "saved", base, 1, extra=extra)).stored(name).operand
    difference = plain[:, :].double() - files_of(base)[name].double()
    torch.testing.assert_close(ours[:, :].double(), other.double() + difference, rtol=0, atol=1e-5)


def test_a_tokenizer_beside_an_adapter_is_nobodys(base, tmp_path):
    """Trainers leave one there, with a token for padding more."""
    folder = make_adapter(tmp_path / "lora", base, 1)
    text = (base / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"7":', '"seven":'))
    check_compatible({"base": Checkpoint.open(base), "a": read(base, folder)})


def test_digest_is_of_the_adapter(base, tmp_path):
    one, two = (read(base, make_adapter(tmp_path / str(seed), base, seed)) for seed in (1, 2))
    before = one.digest()
    assert len({before, two.digest(), Checkpoint.open(base).digest()}) == 3
    (tmp_path / "1" / "adapter_config.json").write_text(json.dumps({**one._settings, "lora_alpha": 7}))
    assert read(base, tmp_path / "1").digest() != before


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"use_dora": True}, "DoRA.*merge_and_unload"),
            ({"peft_type": "IA3"}, 'expected peft_type LORA, got "IA3"'),
            ({"r": 8}, "has rank 4, but adapter_config.json says 8"),
            ({"lora_alpha": None}, "expected a finite number lora_alpha"),
            ({"lora_alpha": math.nan}, "expected a finite number lora_alpha"),
            ({"layer_replication": [[0, 2]]}, "replicated layers"),
            ({"init_lora_weights": "pissa_niter_4"}, "changes the base.*merge_and_unload"),
            ({"init_lora_weights": "lora_ga"}, "changes the base.*path_initial_model_for_weight_conversion"),
            ({"trainable_token_indices": [3]}, "rows of single tokens.*merge_and_unload"),
            ({"target_parameters": ["mlp.experts.down_proj"]}, "stacks of experts.*merge_and_unload"),
            ({"rank_pattern": {"*": 4}}, "no pattern for names"),
            ({"alpha_pattern": 2}, "alpha_pattern: expected patterns with numbers, got 2"),
        ],
    )
    def test_settings(self, base, settings, match, tmp_path):
        adapter = make_adapter(tmp_path / "lora", base, 1)
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **settings}))
        with pytest.raises(CheckpointError, match=match):
            read(base, adapter)

    def test_without_a_base(self, base, tmp_path):
        adapter = make_adapter(tmp_path / "lora", base, 1)
        with pytest.raises(CheckpointError, match="full checkpoint that it was trained on as `base`"):
            open_checkpoints({"a": base, "lora": adapter})

    def test_of_another_base(self, base, tmp_path):
        adapter = make_adapter(tmp_path / "lora", base, 1)
        other = make_checkpoint(tmp_path / "other", "qwen3_moe", 0)
        with pytest.raises(CheckpointError, match="belongs to no tensor of the base"):
            read(other, adapter)

    @pytest.mark.parametrize("key", ["model.norm.lora_A.weight", "model.layers.0.self_attn.k_proj.lora_B.weight"])
    def test_factors_that_do_not_fit(self, base, key, tmp_path):
        extra = {f"base_model.model.{key}": torch.zeros(4, 4)}
        with pytest.raises(CheckpointError, match=r"expected lora_A \(r, in\) and lora_B"):
            read(base, make_adapter(tmp_path / "lora", base, 1, extra=extra))

    def test_factors_that_are_no_floats(self, base, tmp_path):
        adapter = make_adapter(tmp_path / "lora", base, 1)
        factors = load_file(adapter / "adapter_model.safetensors")
        save_file({name: f.to(torch.int8) for name, f in factors.items()}, adapter / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=r"expected factors of floats.*got I8"):
            read(base, adapter)

    def test_factors_that_are_there_twice(self, base, tmp_path):
        extra = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(RANK, 32)}
        with pytest.raises(CheckpointError, match="about the same weight"):
            read(base, make_adapter(tmp_path / "lora", base, 1, extra=extra))

    @pytest.mark.parametrize("stored", [True, False])
    @pytest.mark.parametrize(
        ("key", "match"),
        [
            ("lm_head.weight", "a head that is tied to the embedding"),
            ("lm_head.lora_A.weight", "a head that is tied to the embedding"),
            ("model.embed_tokens.modules_to_save.weight", "an embedding that is tied to the head"),
        ],
    )
    def test_one_of_two_that_are_tied(self, key, match, stored, tmp_path):
        """Of such an embedding peft's merge_and_unload makes a model that is not tied."""
        base = make_checkpoint(tmp_path / "tied", "llama_tied", 0)
        base = store_head(base, tmp_path / "base") if stored else base
        extra = {f"base_model.model.{key}": torch.zeros(22, 32)}
        with pytest.raises(CheckpointError, match=f"changes {match}.*merge_and_unload"):
            read(base, make_adapter(tmp_path / "lora", base, 1, extra=extra, target_modules=["q_proj"]))

    def test_as_the_interface(self, base, tmp_path):
        adapter = make_adapter(tmp_path / "lora", base, 1)
        values = {
            "parents": {"lora": adapter, "b": base},
            "base": base,
            "task": {"kind": "arithmetic"},
            "budget": {"candidates": 5},
        }
        with pytest.raises(CheckpointError, match="cannot be the interface"):
            open_sources(Config.model_validate(values))
        assert isinstance(open_sources(Config.model_validate({**values, "interface": "base"}))["lora"], Adapter)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("side", ["A", "B"])
    def test_factors_that_are_no_numbers(self, base, tmp_path, value, side):
        adapter = make_adapter(tmp_path / "lora", base, 1)
        tensors, key = files_of(adapter), f"base_model.model.model.layers.1.self_attn.q_proj.lora_{side}.weight"
        tensors[key][-1, -1] = value
        save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        opened = open_checkpoints({"base": base, "lora": adapter})["lora"]
        with pytest.raises(CheckpointError, match=rf"adapter_model\.safetensors: tensor {key} holds (NaN|Inf)"):
            opened.stored("model.layers.1.self_attn.q_proj.weight")
        assert opened.stored("model.layers.0.self_attn.q_proj.weight")
