"""Where sources live changes no bit, and is what was asked for."""

import pytest
import torch

from evo.checkpoint import Checkpoint
from evo.materializer import Materializer
from evo.residency import Piece, Pieces, Residency, choose
from search_spaces.recipe import Recipe, Rule, Source
from tests.packing import pack

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
