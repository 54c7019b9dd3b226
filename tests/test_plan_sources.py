"""Bytes of sources and differences, against a materializer that keeps them."""

import math

import pytest
import torch
from transformers import LlamaConfig

from evo.adapter import open_checkpoints
from evo.deltas import LowRankDelta
from evo.materializer import Materializer
from evo.planning.sources import Sources
from evo.residency import Residency
from search_spaces.recipe import Recipe, Rule, Source
from tests.conftest import make_checkpoint
from tests.encoding import stored_bytes
from tests.synthetic import config_of


@pytest.mark.parametrize("deltas", ["exact", "int8", "int4", "low_rank(2)"])
@pytest.mark.parametrize("residency", [Residency.DEVICE, Residency.PINNED, Residency.DISK])
@pytest.mark.parametrize("adapter", [False, True])
def test_sources_are_counted_as_a_materializer_keeps_them(
    moe_parents, llama_adapter, residency, deltas, adapter, monkeypatch
):
    monkeypatch.setattr("evo.materializer.choose", lambda kind, *_, **__: kind)  # pinned without a GPU
    parents = llama_adapter if adapter else {name: moe_parents[name] for name in ("base", "a", "b")}
    config = config_of(parents, space={"kind": "block", "method": "task_arithmetic"}, interface="base")
    checkpoints = open_checkpoints(parents)
    slots = {n: torch.full(e.shape, torch.nan) for n, e in checkpoints["base"].scored.items()}
    base = config.space_base
    writer = Materializer(checkpoints, slots, residency=residency, deltas=deltas, base=base)
    donors = {name: 0.3 for name in parents if name != base}
    recipe = Recipe({n: Source(str(p)) for n, p in parents.items()}, base, "base", (Rule("linear", donors),))
    writer.write({**recipe.to_dict(), "compressed": True})
    kept = list(writer._pieces._kept.values())
    compressed = sum(t.nbytes for held in (writer._deltas._kept.values() if writer._deltas else ()) for t in held)
    items = Sources(config, checkpoints).items(residency, deltas, "host")
    originals = [i for i in items if i.what.startswith(("the checkpoint", "factors")) and "exact scores" not in i.what]
    exact, pinned = sum(t.nbytes for t in kept), sum(2 ** math.ceil(math.log2(t.nbytes)) for t in kept)
    assert sum(i.n_bytes for i in originals) == (pinned if residency is Residency.PINNED else exact)
    assert sum(i.n_bytes for i in items if i.what.startswith("differences")) == compressed
    assert writer._n_bytes() == (exact + compressed, pinned + compressed)
    where = {i.where for i in originals if i.what.startswith("the checkpoint")}
    assert where == {"mapped" if residency is Residency.DISK else "host"}


@pytest.mark.parametrize("residency", [Residency.DEVICE, Residency.DISK])
def test_compressing_is_counted_beside_what_is_kept_by_then(tmp_path, residency, monkeypatch):
    """A large embedding comes first, when hardly anything else is kept: against a real search's first merge."""
    model = LlamaConfig(
        vocab_size=4000, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    parents = {name: make_checkpoint(tmp_path / name, model, seed) for seed, name in enumerate(["base", "a", "b"])}
    config = config_of(parents, space={"kind": "block", "method": "task_arithmetic"}, interface="base")
    checkpoints, took, compress = open_checkpoints(parents), [0], LowRankDelta.compress
    monkeypatch.setattr("evo.deltas._SCRATCH", 1000)

    def kept():
        deltas = sum(t.nbytes for held in writer._deltas._kept.values() for t in held)
        return deltas + (residency is Residency.DEVICE) * sum(t.nbytes for t in writer._pieces._kept.values())

    def watched(self, delta, like):
        took.append(kept() + self.scratch_bytes(tuple(like.shape)))
        return compress(self, delta, like)

    monkeypatch.setattr(LowRankDelta, "compress", watched)
    slots = {n: torch.full(e.shape, torch.nan) for n, e in checkpoints["base"].scored.items()}
    writer = Materializer(checkpoints, slots, residency=residency, deltas="low_rank(2)", base="base")
    rule = Rule("linear", {"a": 0.3, "b": 0.3})
    recipe = Recipe({n: Source(str(p)) for n, p in parents.items()}, "base", "base", (rule,))
    writer.write({**recipe.to_dict(), "compressed": True})
    host, gpu = (Sources(config, checkpoints).items(residency, "low_rank(2)", where) for where in ("host", "gpu"))
    told = sum(item.n_bytes for item in host if item.where == "host")
    assert told == pytest.approx(max(*took, kept()), rel=0.07)  # a donor's difference is counted before it is made
    beside = [next(i.n_bytes for i in items if i.what.startswith("compressing")) for items in (host, gpu)]
    whole = 4 * 4000 * 32 + 1000  # where nothing is kept on the GPU
    assert beside[1] == (beside[0] if residency is Residency.DEVICE else whole)


@pytest.mark.parametrize("residency", [Residency.DEVICE, Residency.PINNED, Residency.DISK])
@pytest.mark.parametrize("deltas", ["exact", "int8"])
def test_what_is_not_on_a_gpu_is_copied_there(chimera, residency, deltas):
    """A matrix of 128 x 256 in bfloat16 of two parents at once; two matrices in turn, from pinned memory."""
    checkpoints = open_checkpoints(chimera.sources)
    items = {item.what: item for item in Sources(chimera, checkpoints).items(residency, deltas, "gpu")}
    arriving = sum(item.n_bytes for what, item in items.items() if what.startswith("what is merged now"))
    largest = 2 * 2 * 128 * 256
    everything_is_there = residency is Residency.DEVICE and deltas == "exact"
    assert arriving == (0 if everything_is_there else 2 * largest if residency is Residency.PINNED else largest)
    if deltas == "int8":
        original = items["the checkpoint reasoner, for exact scores"]
        assert (original.where, original.n_bytes) == ("mapped", stored_bytes(checkpoints["reasoner"]))
