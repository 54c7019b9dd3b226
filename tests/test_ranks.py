"""One candidate over several processes: each merges its own slots only, and together they are the whole merge."""

import multiprocessing

import pytest
import torch
from safetensors.torch import load_file

from evo.adapter import open_checkpoints
from evo.checkpoint import Checkpoint, CheckpointError
from evo.deltas import Absmax
from evo.materializer import Materializer
from evo.merge import kernels
from evo.merge.cpp_loop import find_compiler
from evo.merge.noise import uniforms, uniforms_of_rows
from evo.parallel import LAYOUTS
from evo.planning.ranks import shares
from evo.shards import Shard
from search_spaces.recipe import Recipe, Rule, Source
from tests.conftest import CONFIGS, make_checkpoint
from tests.encoding import to_fp8
from tests.packing import pack
from tests.ranks import run_rank, slots_of
from tests.test_architectures import write_parents

RULES = {
    "linear": Rule("linear", {"a": 0.3, "b": 0.4}),
    "ties": Rule("ties", {"a": 0.7, "b": 0.5}, knobs={"density": 0.3}),
    "dare": Rule("dare_linear", {"a": 0.6, "b": 0.5}, knobs={"density": 0.6}),
}


def recipes_of(parents, **rules):
    sources = {name: Source(str(path)) for name, path in parents.items()}
    rules = rules or RULES
    return {name: Recipe(sources, "base", "a", (rule,), seed=7) for name, rule in rules.items()}


def whole(parents, recipe):
    """The unsharded merge, in float32 or bfloat16 slots."""
    checkpoints = open_checkpoints(parents)
    dtype = {n: torch.float32 if "e_score" in n else torch.bfloat16 for n in checkpoints["a"].scored}
    slots = {n: torch.empty(e.shape, dtype=dtype[n]) for n, e in checkpoints["a"].scored.items()}
    Materializer(checkpoints, slots).write(recipe.to_dict())
    return slots


def assert_union(parts, expected):
    """Each shard is its region of the whole, and all elements are covered."""
    seen = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in expected.items()}
    for key, tensor in parts:
        name, *ends = key.split("|")
        at = tuple(slice(*map(int, end.split(":"))) for end in ends if end) or ...
        assert torch.equal(tensor, expected[name][at]), key
        seen[name][at] = True
    assert all(mask.all() for mask in seen.values())


@pytest.mark.parametrize("n", [2, 4])
def test_the_union_of_the_ranks_is_the_unsharded_merge(moe_parents, n, tmp_path):
    recipes = recipes_of(moe_parents)
    plain = {name: recipe.to_dict() for name, recipe in recipes.items()}
    context, sources = multiprocessing.get_context("spawn"), {k: str(p) for k, p in moe_parents.items()}
    arguments = (n, sources, plain, LAYOUTS, str(tmp_path))
    ranks = [context.Process(target=run_rank, args=(rank, *arguments)) for rank in range(n)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * n
    for name, recipe in recipes.items():
        expected, streamed = (
            whole(moe_parents, recipe),
            dict(Materializer(open_checkpoints(moe_parents)).stream(recipe)),
        )
        assert all(torch.equal(expected[tensor], streamed[tensor]) for tensor in expected)
        for kind in LAYOUTS:
            files = [load_file(tmp_path / f"{kind}-{name}-{rank}.safetensors") for rank in range(n)]
            assert_union([item for file in files for item in file.items()], expected)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_rank_reads_and_holds_no_more_than_its_own(moe_parents, kind, monkeypatch):
    read, tensor = [], Checkpoint.tensor

    def counted(*args, **more):
        read.append(tensor(*args, **more))
        return read[-1]

    monkeypatch.setattr(Checkpoint, "tensor", counted)
    checkpoints = open_checkpoints(moe_parents)
    slots, tensors = slots_of(kind, checkpoints["a"], 1, 2)
    materializer = Materializer(checkpoints, slots, partial=True)
    own = 3 * sum(t.nbytes for t in tensors.values())
    recipes = recipes_of(moe_parents)
    materializer.write(recipes["linear"].to_dict())
    assert sum(t.nbytes for t in read) == own
    materializer.write(recipes["ties"].to_dict())  # reads whole tensors to measure them, and keeps nothing more
    assert sum(t.nbytes for t in materializer._pieces._kept.values()) == own
    n_read = len(read)
    other = Rule("ties", {"a": 0.2, "b": 0.1}, knobs={"density": 0.3})
    materializer.write(recipes_of(moe_parents, ties=other)["ties"].to_dict())
    assert len(read) == n_read


NAME = "model.layers.1.mlp.experts.3.up_proj.weight"  # 16 x 32
REGIONS = [(slice(8, 16), slice(0, 32)), (slice(3, 16), slice(13, 32))]


def assert_regions(parents, rule, name, regions):
    recipe = recipes_of(parents, r=rule)["r"]
    expected = whole(parents, recipe)[name]
    shards = [Shard(torch.empty_like(expected[at]), *at) for at in regions]
    Materializer(open_checkpoints(parents), {name: shards}, partial=True).write(recipe.to_dict())
    assert all(torch.equal(shard.slot, expected[shard.rows, shard.columns]) for shard in shards)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "sce", "arcee_fusion"])
def test_any_region_of_a_matrix_has_the_bits_of_the_whole(moe_parents, method):
    """In odd columns too; with statistics of the whole, of rows, and noise."""
    knobs = {"density": 0.5} if method in ("ties", "dare_ties", "della") else {}
    assert_regions(moe_parents, Rule(method, {"a": 0.6, "b": 0.3}, knobs=knobs), NAME, REGIONS)


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize(("name", "n_compiled"), [("linear", 2), ("ties", 2), ("dare", 1)])
def test_regions_run_the_compiled_loop(moe_parents, name, n_compiled, monkeypatch):
    """But not for noise of some columns."""
    recipe = recipes_of(moe_parents)[name]
    monkeypatch.setattr(kernels, "FUSE_FROM_ELEMENTS", 1 << 60)
    expected = whole(moe_parents, recipe)[NAME]
    monkeypatch.setattr(kernels, "FUSE_FROM_ELEMENTS", 0)
    shards = [Shard(torch.empty_like(expected[at]), *at) for at in REGIONS]
    report = Materializer(open_checkpoints(moe_parents), {NAME: shards}, partial=True).write(recipe.to_dict())
    assert report.n_compiled == n_compiled
    assert all(torch.equal(shard.slot, expected[shard.rows, shard.columns]) for shard in shards)


def test_shards_of_packed_experts(moe_parents, tmp_path):
    """A rank with the odd experts, whose gates and ups it holds in halves."""
    packed = {name: pack(path, tmp_path / name) for name, path in moe_parents.items()}
    name = "model.layers.1.mlp.experts.gate_up_proj"
    for recipe in recipes_of(packed).values():
        expected = whole(packed, recipe)[name]
        experts = [(e, rows) for e in (1, 3, 5, 7) for rows in (slice(0, 8), slice(16, 24))]
        shards = [Shard(torch.empty(8, 32, dtype=torch.bfloat16), rows, expert=e) for e, rows in experts]
        report = Materializer(open_checkpoints(packed), {name: shards}, partial=True).write(recipe.to_dict())
        assert report.n_written == 4
        assert all(torch.equal(s.slot, expected[s.expert, s.rows]) for s in shards)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_convolutions_are_shared_by_whole_rows(kind, tmp_path):
    """Tensors of three dimensions that are no packed experts, as hybrids have: here (32, 1, 3)."""
    parents = write_parents(tmp_path, "lfm2", layer_types=["conv", "full_attention", "conv"])
    name, recipe = "model.layers.0.conv.conv.weight", recipes_of(parents)["ties"]
    checkpoints, expected, found = open_checkpoints(parents), whole(parents, recipe), []
    assert expected[name].shape == (32, 1, 3)
    for rank in range(2):
        slots, _ = slots_of(kind, checkpoints["a"], rank, 2)
        Materializer(checkpoints, slots, partial=True).write(recipe.to_dict())
        found += [shard.slot for shard in slots.get(name, ())]
        assert shares(kind, [checkpoints["a"]], torch.bfloat16, 2)[rank].model > 0
    assert len(found) == (1 if kind == "pipeline" else 2)
    assert all(torch.equal(slot, expected[name]) for slot in found)
    half = Shard(torch.empty(16, 1, 3, dtype=torch.bfloat16), slice(16, 32))
    Materializer(checkpoints, {name: [half]}, partial=True).write(recipe.to_dict())
    assert torch.equal(half.slot, expected[name][16:])
    with pytest.raises(CheckpointError, match="whole rows of a tensor of shape"):
        Materializer(checkpoints, {name: [Shard(torch.empty(32, 2), columns=slice(0, 2))]}, partial=True)


def test_fp8_shards_are_whole_blocks(moe_parents, tmp_path):
    quantized = {name: to_fp8(path, tmp_path / name) for name, path in moe_parents.items()}
    name = "model.layers.0.mlp.down_proj.weight"  # 32 x 48 in blocks of 16 x 16
    for recipe in recipes_of(quantized).values():
        expected = whole(quantized, recipe)[name]
        for at in ((slice(16, 32), slice(None)), (slice(None), slice(16, 48)), (slice(0, 16), slice(32, 48))):
            slot = torch.empty_like(expected[at])
            Materializer(open_checkpoints(quantized), {name: [Shard(slot, *at)]}, partial=True).write(recipe.to_dict())
            assert torch.equal(slot, expected[at])
    with pytest.raises(CheckpointError, match="multiples of 16 rows"):
        Materializer(open_checkpoints(quantized), {name: [Shard(torch.empty(8, 48), slice(0, 8))]}, partial=True)


@pytest.fixture(scope="module")
def wide_parents(tmp_path_factory):
    """Rows long enough for several scales of compressed differences."""
    folder = tmp_path_factory.mktemp("wide")
    config = CONFIGS["llama"]()
    config.intermediate_size = 384
    return {n: make_checkpoint(folder / n, config, seed) for seed, n in enumerate(["base", "a", "b"])}


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("deltas", ["int8", "int4"])
def test_shards_of_compressed_donors(wide_parents, deltas, method):
    recipe = {**recipes_of(wide_parents)[method].to_dict(), "compressed": True}
    name, shape = "model.layers.0.mlp.down_proj.weight", (32, 384)
    checkpoints = open_checkpoints(wide_parents)
    slots = {n: torch.empty(e.shape, dtype=torch.bfloat16) for n, e in checkpoints["a"].scored.items()}
    report = Materializer(checkpoints, slots, deltas=deltas, base="base").write(recipe)
    assert min(report.delta_errors.values()) > 1e-3
    regions = [(slice(0, 10), slice(0, 384)), (slice(10, 32), slice(0, 128)), (slice(10, 32), slice(128, 384))]
    shards = [Shard(torch.empty(*(s.stop - s.start for s in at), dtype=torch.bfloat16), *at) for at in regions]
    writer = Materializer(checkpoints, {name: shards}, partial=True, deltas=deltas, base="base")
    writer.write(recipe)
    assert all(torch.equal(shard.slot, slots[name][shard.rows, shard.columns]) for shard in shards)
    kept = [t for tensors in writer._deltas._kept.values() for t in tensors]
    assert sum(t.nbytes for t in kept) == 2 * Absmax(int(deltas[3:])).n_bytes(shape)


@pytest.mark.parametrize(
    ("deltas", "columns", "match"),
    [("int4", slice(64, 192), "multiples of 1 rows and 128 columns"), ("low_rank(2)", slice(0, 128), "int8 or int4")],
)
def test_shards_that_cannot_be_compressed_are_refused(wide_parents, deltas, columns, match):
    name, shard = "model.layers.0.mlp.down_proj.weight", Shard(torch.empty(32, 128), slice(None), columns)
    with pytest.raises(CheckpointError, match=rf"memory.deltas: {name}: .*{match}"):
        Materializer(open_checkpoints(wide_parents), {name: [shard]}, partial=True, deltas=deltas, base="base")


@pytest.mark.parametrize("stride", [6, 7])
def test_noise_is_numbered_by_the_element(stride):
    key = (3, 5)
    numbers = uniforms(key, 0, 1000)
    found = uniforms_of_rows(key, 9, (5, 3), stride, torch.device("cpu"))
    assert found.tolist() == [[numbers[9 + stride * i + j].item() for j in range(3)] for i in range(5)]
    assert found.unique().numel() > 10


@pytest.mark.parametrize(
    ("shard", "match"),
    [
        (Shard(torch.empty(8, 32), slice(10, 18)), "inside a matrix of 16 x 32"),
        (Shard(torch.empty(8, 32), slice(0, 0)), "inside"),
        (Shard(torch.empty(8, 32), slice(0, 16, 2)), "inside"),
        (Shard(torch.empty(7, 32), slice(0, 8)), "views as 8 x 32, got shape"),
    ],
)
def test_a_shard_that_does_not_fit_is_refused(moe_parents, shard, match):
    with pytest.raises(CheckpointError, match=match):
        Materializer(
            open_checkpoints(moe_parents), {"model.layers.1.mlp.experts.3.up_proj.weight": [shard]}, partial=True
        )


def test_some_of_a_model_has_to_be_asked_for(moe_parents):
    checkpoints = open_checkpoints(moe_parents)
    slots = {name: torch.empty(entry.shape) for name, entry in checkpoints["a"].scored.items()}
    slots["lm_head.weight"] = [Shard(slots["lm_head.weight"])]
    with pytest.raises(CheckpointError, match=r"1 tensor.*lm_head.*partial=True"):
        Materializer(checkpoints, slots)
