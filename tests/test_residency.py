"""Where sources live changes no bit, and is what was asked for."""

import contextlib

import pytest
import torch
from safetensors.torch import save_file

from evo.checkpoint import Checkpoint
from evo.materializer import Materializer
from evo.residency import Piece, Pieces, Residency, choose
from search_spaces.recipe import Recipe, Rule, Source
from tests.packing import pack
from tests.pretend import GPU, OnGpu, gpu

KINDS = (Residency.DEVICE, Residency.PINNED, Residency.DISK)


def recipe_of(parents, share):
    rules = (Rule("ties", {"a": share, "b": 0.5}, blocks=(0,), knobs={"density": 0.5}), Rule("linear", {"a": share}))
    return Recipe({name: Source(str(path)) for name, path in parents.items()}, "base", "a", rules)


@pytest.mark.parametrize("packed", [False, True])
def test_all_residencies_have_the_same_bits(moe_parents, packed, tmp_path, monkeypatch):
    monkeypatch.setattr("evo.materializer.choose", lambda kind, *_, **__: kind)  # pinned without a GPU
    parents = {n: pack(p, tmp_path / n) for n, p in moe_parents.items()} if packed else moe_parents
    checkpoints = {name: Checkpoint.open(path) for name, path in parents.items()}
    entries = checkpoints["base"].entries
    for share in (0.25, 0.75):
        expected = dict(Materializer(checkpoints).stream(recipe_of(parents, share)))
        for kind in KINDS:
            slots = {name: torch.full(entry.shape, torch.nan) for name, entry in entries.items()}
            writer = Materializer(checkpoints, slots, residency=kind)
            for first in (0.4, share):  # the second candidate meets what the first has left
                writer.write(recipe_of(parents, first).to_dict())
            assert all(torch.equal(slots[name], expected[name].float()) for name in expected), kind


def test_what_is_read_ahead_is_what_is_wanted(moe_parents):
    checkpoint = Checkpoint.open(moe_parents["a"])
    cpu, names = torch.device("cpu"), list(checkpoint.headers)[:4]
    pieces = Pieces(Residency.PINNED)
    for name, following in zip(names, [*names[1:], names[0]], strict=True):
        pieces.prefetch([(Piece(checkpoint, following), cpu)])
        assert torch.equal(pieces.read(Piece(checkpoint, name), cpu), checkpoint.tensor(name))


class Stream:
    """Writes down what a GPU's stream is asked."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def record_event(self):
        return f"{self.name} after {self.log[-1]}"

    def wait_event(self, event):
        self.log.append(f"{self.name} waits: {event}")

    def synchronize(self):
        self.log.append(f"Python waits for {self.name}")


@pytest.fixture
def log(monkeypatch):
    """What the streams of a GPU that is not there are asked, copies included."""
    log = []
    merging, copying = Stream(log, "merging"), Stream(log, "copying")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: merging)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: copying)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: log.append("Python waits for the GPU"))
    made = OnGpu.__init__
    monkeypatch.setattr(OnGpu, "__init__", lambda self, host: log.append(f"copy {len(host)}") or made(self, host))
    return log


def test_a_merge_waits_for_its_own_copies_and_python_for_merges(log, tmp_path):
    """Two parts are on the GPU, and each merge runs beside the copies of the part after it."""
    tensors = {str(n): torch.zeros(n) for n in range(1, 6)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint, pieces = Checkpoint.open(tmp_path), Pieces(Residency.PINNED)
    with gpu():
        for n in range(1, 6):
            following = [(Piece(checkpoint, str(n + 1)), GPU)] if n < 5 else []
            pieces.prefetch(following * 2)  # two sources that share it
            for _ in range(2):
                pieces.read(Piece(checkpoint, str(n)), GPU)
            log.append(f"merge {n}")
    assert log[log.index("merge 1") + 1 :] == [
        step
        for n in range(2, 6)
        for step in (
            "Python waits for merging",
            *([f"copy {n + 1}"] if n < 5 else []),
            *[f"merging waits: copying after copy {n}"] * 2,
            f"merge {n}",
        )
    ]


def test_a_write_ends_when_the_gpu_has_merged_and_holds_no_copies(log, moe_parents):
    checkpoints = {name: Checkpoint.open(path) for name, path in moe_parents.items()}
    entries, recipe = checkpoints["base"].entries, recipe_of(moe_parents, 0.25)
    expected = dict(Materializer(checkpoints).stream(recipe))
    for residency in KINDS:
        with gpu():
            slots = {name: torch.full(entry.shape, torch.nan, device=GPU) for name, entry in entries.items()}
            writer = Materializer(checkpoints, slots, residency=residency)
            writer.write(recipe.to_dict())
        assert log[-1] == "Python waits for the GPU"
        assert not any(copies.tensors for copies in writer._pieces._copies)
        assert all(torch.equal(slots[name].host, expected[name].float()) for name in expected), residency


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_two_parts_are_on_the_gpu_however_many_there_are(tmp_path):
    n, here = 1 << 22, torch.device("cuda", torch.cuda.current_device())
    save_file({f"{i:02}": torch.full((n,), float(i)) for i in range(12)}, tmp_path / "model.safetensors")
    checkpoint, pieces = Checkpoint.open(tmp_path), Pieces(Residency.PINNED)
    names = [*checkpoint.headers, *checkpoint.headers]
    found = torch.zeros(len(names), device=here)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    for i, name in enumerate(names):
        pieces.prefetch([(Piece(checkpoint, following), here) for following in names[i + 1 : i + 2]])
        found[i] = pieces.read(Piece(checkpoint, name), here)[-1]
        torch.cuda._sleep(1 << 24)  # a merge that takes longer than to ask for it
    assert found.tolist() == [float(name) for name in names]
    assert torch.cuda.max_memory_reserved() - before <= 3 * 4 * n  # the first is read by itself, beside the next


def test_device_and_pinned_keep_a_copy_and_disk_keeps_none(moe_parents, monkeypatch):
    checkpoint = Checkpoint.open(moe_parents["a"])
    cpu, name = torch.device("cpu"), next(iter(checkpoint.headers))
    cut = Piece(checkpoint, name, cut=(slice(0, 4),))
    read = Checkpoint.tensor
    for kind in KINDS:
        pieces, n_reads = Pieces(kind), []
        monkeypatch.setattr(Checkpoint, "tensor", lambda *a, n=n_reads, **more: n.append(1) or read(*a, **more))
        first, second = pieces.read(cut, cpu), pieces.read(cut, cpu)
        monkeypatch.setattr(Checkpoint, "tensor", read)
        assert len(n_reads) == (2 if kind is Residency.DISK else 1) and torch.equal(first, second)


def test_auto_takes_what_fits():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    def free(device):
        return 100 if device.type == "cuda" else 1000

    assert [choose(Residency.AUTO, gpu, n, m, free=free) for n, m in ((50, 64), (51, 64), (400, 500), (400, 501))] == [
        Residency.DEVICE, Residency.PINNED, Residency.PINNED, Residency.DISK
    ]  # fmt: skip
    assert choose(Residency.AUTO, cpu, 1, 1) is Residency.DISK
    assert choose(Residency.AUTO, cpu, 1, 1, shards=True) is Residency.DEVICE
    assert choose(Residency.PINNED, gpu, 10**9, 10**9) is Residency.PINNED
    with pytest.raises(ValueError, match=r"pinned.*expected 'device', 'disk' or 'auto'"):
        choose(Residency.PINNED, cpu, 1, 1)
