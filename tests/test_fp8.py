"""DeepSeek's FP8 against numpy code of the published formulas, and torch's casts."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evo.checkpoint import Checkpoint, CheckpointError
from evo.compatible import check_compatible
from evo.encodings import EncodingError, TensorHeader, fp8_blocks
from evo.encodings.fp8_blocks import Fp8Blocks, find
from evo.encodings.rounding import Rounding
from evo.materializer import Materializer
from evo.merge import kernels
from evo.merge.cpp_loop import find_compiler
from evo.merge.scaled import floats
from fitness.engines.transformers import TransformersEngine
from search_spaces.recipe import Recipe, Rule
from tests.conftest import make_checkpoint
from tests.encoding import dequantize, e4m3_round, e4m3_values, files_of, is_quantized, quantize, to_fp8, values_in
from tests.test_materializer import copy_of, exported, random_recipe, sources_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, params=["on tensors", "compiled"])
def path(request, monkeypatch):
    """Both paths have to do everything: what is compiled is compiled for tensors of any size."""
    if request.param == "on tensors":
        monkeypatch.setenv(kernels.OFF, "1")
    elif find_compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    monkeypatch.setattr(kernels, "FUSE_FROM_ELEMENTS", 0)


def encode(w, encoding, chunk=1000):
    return encoding.encode(w.shape, CPU, lambda block: w[block], chunk)


@pytest.fixture(scope="module", params=[None, "ue8m0"])
def fp8_parents(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    plain = {name: make_checkpoint(folder / name, "deepseek_v3", seed) for seed, name in enumerate(["base", "a", "b"])}
    return {name: to_fp8(path, folder / f"{name}-fp8", scale_fmt=request.param) for name, path in plain.items()}


def test_every_code_means_what_the_standard_says():
    codes = torch.arange(256, dtype=torch.uint8)
    expected = e4m3_values()
    ours = floats(codes.view(torch.float8_e4m3fn)).numpy()
    number = ~np.isnan(expected)
    assert np.array_equal(ours[number], expected[number])
    assert np.array_equal(np.signbit(ours), np.signbit(np.where(number, expected, ours)))
    assert torch.equal(codes.view(torch.float8_e4m3fn).float()[number], torch.from_numpy(ours)[number])


@pytest.mark.parametrize("shape", [(128, 128), (300, 257), (1, 5), (129, 127)])
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("held", [0, 2 * 128 * 257, 1 << 23], ids=["a band", "two bands", "all"])
def test_rounds_as_deepseek_publishes(shape, ue8m0, held, monkeypatch):
    monkeypatch.setattr(fp8_blocks, "HELD_ELEMENTS", {"cpu": held})
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, shape[1])
    w[: shape[0] // 3, : shape[1] // 2] = 0.0
    codes, scales = quantize(w.numpy(), ue8m0=ue8m0)
    encoding = Fp8Blocks(powers_of_two=ue8m0)
    numbers, ours = encode(w, encoding)
    assert np.array_equal(ours.numpy(), scales)
    assert np.array_equal(numbers.view(torch.uint8).numpy() & 127, codes & 127)
    assert torch.equal(numbers.float(), torch.from_numpy(codes).view(torch.float8_e4m3fn).float())
    assert np.array_equal(encoding.operand((numbers, ours))[:, :].numpy(), dequantize(codes, scales))


@given(st.lists(st.floats(-448, 448, width=32), min_size=1, max_size=64))
def test_rounding_is_to_nearest_even_as_in_torch(values):
    x = np.array(values, np.float32)
    ours = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(ours, e4m3_round(x))


@pytest.mark.parametrize("ue8m0", [False, True])
def test_what_has_been_stored_once_is_stored_again_exactly(ue8m0):
    """With powers of two the scales stay; others move by a rounding at most, and the values with them."""
    w = torch.randn(40, 40, generator=torch.Generator().manual_seed(1))
    encoding = Fp8Blocks((16, 16), powers_of_two=ue8m0)
    once = encode(w, encoding)
    again = encode(encoding.operand(once)[:, :], encoding)
    assert torch.equal(once[0].view(torch.uint8), again[0].view(torch.uint8))
    torch.testing.assert_close(again[1], once[1], rtol=0 if ue8m0 else 2**-22, atol=0)


def test_any_block_of_an_operand_is_that_block():
    encoding = Fp8Blocks((16, 8))
    pieces = encode(torch.randn(50, 30), encoding)
    whole = torch.from_numpy(dequantize(pieces[0].view(torch.uint8).numpy(), pieces[1].numpy(), (16, 8)))
    operand = encoding.operand(pieces)
    for rows, columns in [((0, 50), (0, 30)), ((15, 17), (0, 30)), ((3, 40), (0, 30)), ((31, 32), (7, 25))]:
        block = (slice(*rows), slice(*columns))
        assert torch.equal(operand[block], whole[block])
    assert torch.equal(operand[5:20], whole[5:20])


def test_a_block_that_is_not_finite_spoils_nothing_else():
    w = torch.randn(32, 32)
    w[0, 0], w[20, 20] = torch.nan, torch.inf
    encoding = Fp8Blocks((16, 16))
    values = encoding.operand(encode(w, encoding))[:, :]
    assert not torch.isfinite(values[:16, :16]).any()
    assert not torch.isfinite(values[16:, 16:]).any()
    assert torch.isfinite(values[:16, 16:]).all()
    assert torch.isfinite(values[16:, :16]).all()


def engine_of(parents, dtype="float32"):
    engine = TransformersEngine(str(parents["a"]), dtype=dtype, device="cpu", batch_size=8)
    engine.host("evo.materializer:Materializer.hosted", sources={n: str(p) for n, p in parents.items()})
    return engine


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_scored_equals_exported(fp8_parents, method, dtype, tmp_path):
    """The resident model holds the values of the exported bits, rounded to its dtype."""
    recipe = random_recipe(fp8_parents, "task_arithmetic" if method == "ties" else method, seed=1)
    engine = engine_of(fp8_parents, dtype)
    engine.update(recipe.to_dict())
    values = values_in(exported(fp8_parents, recipe, tmp_path / "out"))
    assert values.keys() == Checkpoint.open(fp8_parents["a"]).entries.keys()
    for name, value in values.items():
        slot = engine.slots()[name]
        assert torch.equal(slot, torch.from_numpy(value).to(slot.dtype)), name
    assert all(torch.isfinite(t).all() for t in engine._model.state_dict().values())
    assert engine.generate(["1+2"], max_tokens=4)


def test_values_are_quantised_once_from_an_independent_merge(fp8_parents, tmp_path):
    ue8m0 = Checkpoint.open(fp8_parents["a"]).quantization.get("scale_fmt") == "ue8m0"
    recipe = Recipe(sources_of(fp8_parents), "b", "a", (Rule("linear", {"a": 0.25}),))
    a, b = (values_in(fp8_parents[name]) for name in "ab")
    merged = files_of(exported(fp8_parents, recipe, tmp_path / "out"))
    assert merged.keys() == files_of(fp8_parents["a"]).keys()
    for name in a:
        expected = np.float32(0.75) * b[name] + np.float32(0.25) * a[name]
        if is_quantized(name):
            codes, scales = quantize(expected, (16, 16), ue8m0)
            assert torch.equal(merged[f"{name}_scale_inv"], torch.from_numpy(scales)), name
            assert torch.equal(merged[name].float(), torch.from_numpy(codes).view(torch.float8_e4m3fn).float()), name
        else:
            assert merged[name].dtype == (torch.float32 if "e_score" in name else torch.bfloat16)
            assert torch.equal(merged[name], torch.from_numpy(expected).to(merged[name].dtype)), name


def test_copies_keep_bits_and_scales(fp8_parents, tmp_path):
    rules = (Rule("linear", {"a": 1.0}, blocks=(0, 1)), Rule("linear", {"a": 0.5}, blocks=(2,)))
    out = files_of(exported(fp8_parents, Recipe(sources_of(fp8_parents), "b", "a", rules), tmp_path / "out"))
    a, b = files_of(fp8_parents["a"]), files_of(fp8_parents["b"])
    for name in a:
        if ".layers.2." not in name:
            source = a if ".layers." in name else b
            assert torch.equal(out[name].view(torch.uint8), source[name].view(torch.uint8)), name


def test_transformers_reads_the_export(fp8_parents, tmp_path):
    """Its own dequantisation, tensor by tensor (it refuses ragged edges, and loading wants accelerate)."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    recipe = random_recipe(fp8_parents, "linear", seed=2)
    out = exported(fp8_parents, recipe, tmp_path / "out")
    files, values, n = files_of(out), values_in(out), 0
    for name in filter(is_quantized, files):
        if not (files[name].shape[0] % 16 or files[name].shape[1] % 16):
            theirs = Fp8Dequantize(None)._dequantize_one(files[name], files[f"{name}_scale_inv"], torch.float32)
            assert np.array_equal(theirs.numpy(), values[name])
            n += 1
    assert n > 20
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"


class TestRefused:
    def broken(self, parents, tmp_path, change):
        """A copy of a parent with one file changed."""
        import shutil

        from safetensors.torch import load_file, save_file

        folder = shutil.copytree(parents["a"], tmp_path / "broken")
        for file in sorted(folder.glob("*.safetensors")):
            tensors = load_file(file)
            if change(tensors):
                save_file(tensors, file, metadata={"format": "pt"})
                index = json.loads((folder / "model.safetensors.index.json").read_text())
                index["weight_map"] = {
                    name: where for name, where in index["weight_map"].items() if where != file.name or name in tensors
                }
                (folder / "model.safetensors.index.json").write_text(json.dumps(index))
                return folder
        raise AssertionError("nothing was changed")

    def test_scales_are_missing(self, fp8_parents, tmp_path):
        def change(tensors):
            return [tensors.pop(name) for name in list(tensors) if name.endswith("q_a_proj.weight_scale_inv")]

        with pytest.raises(CheckpointError, match=r"q_a_proj\.weight is FP8 without a table of scales"):
            Checkpoint.open(self.broken(fp8_parents, tmp_path, change))

    def test_scales_for_other_blocks(self, fp8_parents, tmp_path):
        folder = self.broken(fp8_parents, tmp_path, lambda tensors: True)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["weight_block_size"] = [8, 8]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"one for each block of 8 x 8.*weight_block_size"):
            Checkpoint.open(folder)

    @pytest.mark.parametrize("block", [[8], [8, 0], [8, "x"], [8, 8, 8], "88", 8])
    def test_blocks_that_are_none(self, block):
        with pytest.raises(EncodingError, match="weight_block_size: expected two numbers above 0"):
            list(find({}, {"weight_block_size": block}))

    @pytest.mark.parametrize(
        ("name", "shape", "scales"),
        [
            ("a.weight", (16, 24), (1, 2)),
            ("mlp.experts.down_proj", (3, 16, 24), (3, 1, 2)),
            ("conv.weight", (3, 16, 24), None),
            ("mlp.experts.down_proj", (2, 3, 16, 24), None),
            ("norm.weight", (16,), None),
        ],
    )
    def test_only_matrices_have_blocks(self, name, shape, scales):
        """And experts that are packed: theirs are one after the other."""
        found = {name: TensorHeader("F8_E4M3", shape)}
        found[f"{name}_scale_inv"] = TensorHeader("F32", scales or (*shape[:-2], 1, 2))
        if scales:
            (entry,) = find(found, {"weight_block_size": [16, 16]})
            assert (entry.name, entry.shape) == (name, shape)
        else:
            with pytest.raises(EncodingError, match=r"_scale_inv: expected None float32 numbers"):
                list(find(found, {"weight_block_size": [16, 16]}))

    @pytest.mark.parametrize("code", [0x7F, 0xFF])
    def test_not_a_number(self, fp8_parents, tmp_path, code):
        def change(tensors):
            for name, tensor in tensors.items():
                if tensor.dtype == torch.float8_e4m3fn:
                    tensor.view(torch.uint8)[0, 0] = code
                    return name
            return None

        folder = self.broken(fp8_parents, tmp_path, change)
        with pytest.raises(CheckpointError, match=r"safetensors: tensor .*proj\S* holds NaN"):
            exported({**fp8_parents, "a": folder}, copy_of("a", sources_of(fp8_parents), "a"), tmp_path / "out")

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_a_scale_that_is_no_number(self, fp8_parents, tmp_path, value):
        def change(tensors):
            for name, tensor in tensors.items():
                if name.endswith("_scale_inv"):
                    tensor[-1, -1] = value
                    return name
            return None

        folder = self.broken(fp8_parents, tmp_path, change)
        with pytest.raises(CheckpointError, match=r"tensor \S*_scale_inv holds (NaN|Inf)"):
            exported({**fp8_parents, "a": folder}, copy_of("a", sources_of(fp8_parents), "a"), tmp_path / "out")

    def test_parents_stored_in_different_ways(self, fp8_parents):
        plain = fp8_parents["a"].parent / "a"
        with pytest.raises(CheckpointError, match=r"BF16 .* in plain, F8_E4M3 with scales for 16 x 16"):
            check_compatible({"plain": Checkpoint.open(plain), "fp8": Checkpoint.open(fp8_parents["a"])})


def test_the_cost_of_rounding_is_reported(fp8_parents, tmp_path):
    recipe = Recipe(sources_of(fp8_parents), "b", "a", (Rule("linear", {"a": 0.25}, blocks=(1,)),))
    rounding = Rounding()
    merged = dict(Materializer({n: Checkpoint.open(p) for n, p in fp8_parents.items()}).stream(recipe, rounding))
    a, b = (values_in(fp8_parents[name]) for name in "ab")
    assert set(rounding.errors) == {name for name in a if is_quantized(name) and ".layers.1." in name}
    for name, error in rounding.errors.items():
        exact = 0.75 * b[name].astype(np.float64) + 0.25 * a[name]
        codes, scales = merged[name].view(torch.uint8).numpy(), merged[f"{name}_scale_inv"].numpy()
        difference = dequantize(codes, scales, (16, 16)) - exact
        assert error == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(exact), rel=1e-4)
        assert 0.01 < error < 0.05  # E4M3 has steps of 1/8 to 1/16 of a number
    exported(fp8_parents, recipe, tmp_path / "out")
    assert rounding.summary() in (tmp_path / "out" / "README.md").read_text()
