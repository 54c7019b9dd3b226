"""What a merge takes on a GPU for a while, against what one really makes on a GPU that is not there (pretend.py)."""

import weakref
from functools import partial

import pytest
import torch

from evo.adapter import open_checkpoints
from evo.materializer import Materializer
from evo.merge import kernels
from evo.planning.footprint import model_bytes
from evo.planning.merges import MERGE_BYTES, merge_bytes
from evo.planning.plan import Load, Settings, make_plan
from evo.planning.sources import Sources
from evo.residency import Residency
from evo.vocabulary import common_rows
from search_spaces.recipe import Recipe, Rule, Source
from tests.conftest import VOCABULARY, make_checkpoint
from tests.encoding import to_fp8
from tests.pretend import GPU, OnGpu, gpu
from tests.synthetic import config_of
from tests.test_merge_compiled import needs_compiler
from tests.test_mxfp4 import make_gpt_oss
from tests.test_vocabulary import grow

pytestmark = needs_compiler


class Memory:
    """Bytes of all tensors on the GPU, which views share: now, and at most beyond what is there to stay."""

    def __init__(self):
        self.held, self.now, self.most, self.staying = {}, 0, 0, int

    def add(self, tensor):
        storage = tensor.host.untyped_storage()
        key, n = storage.data_ptr(), storage.nbytes()
        if not n:
            return
        if self.held.setdefault(key, 0) == 0:
            self.now += n
        self.held[key] += 1
        self.most = max(self.most, self.now - self.staying())
        weakref.finalize(tensor, self.drop, key, n)

    def drop(self, key, n):
        self.held[key] -= 1
        if self.held[key] == 0:
            self.now -= n


@pytest.fixture
def memory(monkeypatch):
    memory, made = Memory(), OnGpu.__init__

    def watched(self, host):
        made(self, host)
        memory.add(self)

    monkeypatch.setattr(OnGpu, "__init__", watched)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(kernels, "_loops", {})
    monkeypatch.setattr(kernels, "FUSE_FROM_ELEMENTS", 0)
    monkeypatch.setattr("evo.planning.merges.FUSE_FROM_ELEMENTS", 0)
    monkeypatch.setattr("evo.merge.apply._CHECKED_ELEMENTS", 8)  # small beside a part, as it is where parts are large
    monkeypatch.setitem(kernels.LOOPS, "cuda", "tests.test_gpu:GpuLoop")
    return memory


def staying(model, writer):
    """Bytes of the model and the sources, of which a GPU that is not there has a copy for each part, too."""
    parts = (piece for stored in writer._reader._there.values() for piece in stored.pieces)
    storages = [tensor.host.untyped_storage() for tensor in (*writer._pieces._kept.values(), *parts)]
    return model + sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def taken(memory, parents, dtype, n_writes=2):
    """By the last of some merges, beyond the model and the sources, which stay on the GPU."""
    checkpoints, names = open_checkpoints(parents), list(parents)
    shapes = {name: entry.shape for name, entry in checkpoints[names[0]].scored.items()}
    sources = {name: Source(str(path)) for name, path in parents.items()}
    with gpu():
        slots = {name: torch.empty(shape, dtype=dtype, device=GPU) for name, shape in shapes.items()}
        writer = Materializer(checkpoints, slots, residency=Residency.DEVICE)
        memory.staying = partial(staying, memory.now, writer)
        for n in range(1, n_writes + 1):
            rule, memory.most = Rule("linear", dict.fromkeys(names[1:], 0.1 * n)), 0
            writer.write(Recipe(sources, names[0], names[0], (rule,)).to_dict())
        assert memory.now == memory.staying()
    memory.staying = int  # which lets go of the model
    return memory.most


def told(parents, dtype, device="gpu", method="linear"):
    checkpoints = open_checkpoints(parents)
    common = common_rows(checkpoints)
    interface = next(iter(checkpoints.values()))
    return merge_bytes(method, interface, checkpoints, common, dtype, device) - MERGE_BYTES


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamas")
    return {name: make_checkpoint(folder / name, "llama", seed) for seed, name in enumerate("ab")}


def test_a_model_in_another_dtype_has_each_part_made_first(memory, llamas):
    assert told(llamas, "bfloat16") == 0
    assert taken(memory, llamas, torch.bfloat16) == 0
    largest = 2 * 32 * max(len(VOCABULARY), 48)
    assert told(llamas, "float32") == largest
    assert taken(memory, llamas, torch.float32) == largest


def test_rows_in_common_are_made_beside_all(memory, llamas, tmp_path):
    n = len(VOCABULARY)
    parents = {"a": grow(llamas["b"], tmp_path / "padded", 4 * n), "b": llamas["a"]}
    assert told(parents, "bfloat16") == 2 * 32 * (n + 4 * n)
    assert taken(memory, parents, torch.bfloat16) == told(parents, "bfloat16")


@pytest.mark.parametrize("block", [(8, 8), (8, 16)])
def test_fp8_is_rounded_in_bands_and_looked_at_once(memory, moe_parents, tmp_path, block, monkeypatch):
    """Scales, and the largest number of each column of a block, take little: of blocks as large as they are in use."""
    parents = {name: to_fp8(path, tmp_path / name, block) for name, path in moe_parents.items()}
    first, again = (taken(memory, parents, torch.bfloat16, n) for n in (1, 2))
    assert first == pytest.approx(told(parents, "bfloat16"), rel=0.01)
    monkeypatch.setattr("evo.planning.merges.FUSE_FROM_ELEMENTS", 1 << 40)
    assert again == pytest.approx(told(parents, "bfloat16"), rel=0.07)


def test_experts_of_mxfp4_are_decoded_one_part_at_a_time(memory, tmp_path):
    """Of both sources, on a CPU, too."""
    parents = {name: make_gpt_oss(tmp_path / name, seed, packed=True) for seed, name in enumerate("ab")}
    expert = 64 * 64
    assert told(parents, "bfloat16") == told(parents, "bfloat16", "host") == 2 * 2 * expert + 2 * expert
    found = taken(memory, parents, torch.bfloat16)
    assert 2 * 2 * expert <= found <= 1.1 * told(parents, "bfloat16")
    assert told(parents, "bfloat16", method="ties") == 2 * 2 * expert + 8 * expert


def test_a_plan_counts_it_where_it_is_made(llamas):
    """A loop of a CPU makes what is measured, as before."""
    config = config_of(llamas, space={"kind": "block", "method": "linear"}, interface="a", base="a")
    sources, load = Sources(config, open_checkpoints(llamas)), Load(prompt=10, answers=200, evaluations=1000)
    found = {
        where: next(i.n_bytes for i in plan.items if i.what == "a merge")
        for where in ("gpu", "host")
        for plan in [make_plan(config, sources, load, Settings(where, "float32", 1), python_bytes=0)]
    }
    assert found == {"gpu": MERGE_BYTES + told(llamas, "float32"), "host": MERGE_BYTES}
    assert model_bytes(sources.interface, "float32") > told(llamas, "float32") > 0
