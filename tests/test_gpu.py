"""What runs on a GPU computes with nothing of the host beside it: on one that is not there (pretend.py)."""

import contextlib
from dataclasses import replace

import pytest
import torch

from evo.checkpoint import Checkpoint
from evo.materializer import Materializer
from evo.merge import METHODS, Measure, get_method, kernels
from evo.merge.cpp_loop import CppLoop
from evo.residency import Residency
from fitness.engines.columns import one_token
from fitness.engines.transformers import TransformersEngine
from fitness.types import Decoding
from search_spaces.recipe import Recipe, Rule, Source
from tests.conftest import make_checkpoint
from tests.encoding import to_fp8
from tests.merging import SETTINGS
from tests.pretend import GPU, OnGpu, gpu
from tests.test_merge_compiled import DELTAS, bits, compressed, in_fp8, needs_compiler, on_tensors, part_merge


def merged(name, stored="bfloat16", device="cpu"):
    merge = part_merge(name, shape=(37, 1032), device=device)
    if stored == "fp8":
        merge = in_fp8(merge)
    return on_tensors(compressed(merge, stored) if stored in DELTAS else merge)


@pytest.mark.parametrize(
    ("name", "stored"), [*((name, "bfloat16") for name in METHODS), *(("linear", how) for how in ("fp8", *DELTAS))]
)
def test_merges_measure_and_merge_on_the_gpu(name, stored, monkeypatch):
    monkeypatch.setattr(torch.random, "fork_rng", lambda _: contextlib.nullcontext())
    expected = merged(name, stored)
    with gpu():
        found = merged(name, stored, GPU)
    assert isinstance(found, OnGpu) and torch.equal(bits(found.host), bits(expected))


class GpuLoop(CppLoop):
    """What a tape is compiled to for a GPU that is not there."""

    def pack(self, given):
        assert all(isinstance(tensor, OnGpu) for tensor in (*given.tensors, *given.tables))
        hosts = ([tensor.host for tensor in tensors] for tensors in (given.tensors, given.tables))
        return super().pack(given._replace(**dict(zip(("tensors", "tables"), hosts, strict=True))))

    def run(self, packed, out, begin, n_columns):
        super().run(packed, out.host, begin, n_columns)


@needs_compiler
def test_all_that_a_loop_reads_is_on_the_gpu(moe_parents, tmp_path, monkeypatch):
    """Of FP8, which is read, merged, rounded and decoded by four loops."""
    monkeypatch.setattr(kernels, "FUSE_FROM_ELEMENTS", 0)
    monkeypatch.setattr(kernels, "_loops", {})
    monkeypatch.setitem(kernels.LOOPS, "cuda", f"{__name__}:GpuLoop")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    parents = {name: to_fp8(path, tmp_path / name) for name, path in moe_parents.items()}
    checkpoints = {name: Checkpoint.open(path) for name, path in parents.items()}
    rule = Rule("della", {"a": 0.3, "b": 0.45}, knobs=SETTINGS["della"])
    recipe = Recipe({name: Source(str(path)) for name, path in parents.items()}, "base", "a", (rule,)).to_dict()
    shapes = {name: entry.shape for name, entry in checkpoints["base"].scored.items()}
    expected = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    Materializer(checkpoints, expected).write(recipe)
    with gpu():
        slots = {name: torch.empty(shape, dtype=torch.bfloat16, device=GPU) for name, shape in shapes.items()}
        report = Materializer(checkpoints, slots, residency=Residency.DEVICE).write(recipe)
    assert report.n_compiled == report.n_written
    assert all(torch.equal(bits(slots[name].host), bits(expected[name])) for name in shapes)


def test_an_engine_that_loads_by_itself_is_fed_from_the_gpu_and_parts_are_measured_once(moe_parents, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    checkpoints = {name: Checkpoint.open(path) for name, path in moe_parents.items()}
    rule = Rule("ties", {"a": 0.3, "b": 0.45}, knobs=SETTINGS["ties"])
    recipe = Recipe({name: Source(str(path)) for name, path in moe_parents.items()}, "base", "a", (rule,))
    expected, measured, ties = dict(Materializer(checkpoints).stream(recipe)), [], get_method("ties")
    counted = Measure(lambda *a, **k: measured.append(1) or ties.measure.function(*a, **k), ("density",), True)
    monkeypatch.setattr("evo.job.get_method", lambda _: replace(ties, measure=counted))
    with gpu():
        feeder = Materializer(checkpoints, device=GPU, residency=Residency.DISK)
        for _ in range(2):
            found = []
            feeder.feed(recipe.to_dict(), found.extend)
        found = {name: tensor.cpu() for name, tensor in found}
    assert len(measured) == 2 * len(feeder.layout.parts)
    assert all(torch.equal(bits(found[name]), bits(expected[name])) for name in expected)


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(greedy=True),
        Decoding(greedy=False, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1, stop=("7",)),
    ],
    ids=["greedy", "drawn"],
)
def test_text_is_decoded_on_the_gpu(decoding, tmp_path):
    path = make_checkpoint(tmp_path / "m", "llama", 1)
    prompts, seeds = ["1+2=", "3+4*5=", "5", "9*9*9=", "3"], [1, 2, 3, 4, 5]
    options = {"attn_implementation": "eager"}
    engine = TransformersEngine(
        str(path), dtype="float32", device="cpu", batch_size=3, decoding=decoding, options=options
    )

    def answers():
        return engine.generate(prompts, max_tokens=40, seeds=seeds), engine.log_likelihood(prompts[:2], ["3", "7"])

    expected = answers()
    with gpu():
        for module in engine._model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    held[name] = None if tensor is None else torch.nn.Parameter(OnGpu(tensor.detach()), False)
        engine.device, engine._decoder._stop_ids = GPU, OnGpu(engine._decoder._stop_ids)
        engine._decoder._like = one_token(engine._model)
        assert engine._model.device == GPU
        assert answers() == expected
