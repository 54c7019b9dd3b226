"""Compressed differences, against quantisation and SVD by numpy."""

import ctypes
import subprocess
import sys

import numpy as np
import pytest
import torch

from evo.checkpoint import Checkpoint
from evo.deltas import BLOCK, Absmax, Deltas, LowRankDelta, parse
from evo.materializer import Materializer
from evo.merge.blocks import blocks
from evo.residency import Residency
from search_spaces.recipe import Recipe, Rule, Source
from tests.test_architecture import ROOT


def base_and_delta(shape, seed=0):
    rng = np.random.default_rng(seed)
    base = torch.from_numpy(rng.normal(size=shape).astype(np.float32)).bfloat16()
    return base, torch.from_numpy((0.01 * rng.normal(size=shape)).astype(np.float32))


def quantised(delta: np.ndarray, bits: int) -> np.ndarray:
    """Number by number, as the paper says it."""
    found = np.zeros_like(delta)
    largest = np.float32(2 ** (bits - 1) - 1)
    for row in range(delta.shape[0]):
        for start in range(0, delta.shape[1], BLOCK):
            block = delta[row, start : start + BLOCK]
            scale = np.abs(block).max() / largest
            if scale > 0:
                found[row, start : start + BLOCK] = np.round(block / scale) * scale
    return found


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(5, 384), (3, 301), (7, 2)])
def test_blockwise_absmax(bits, shape):
    base, delta = base_and_delta(shape)
    delta[1] = 0.0
    donor = Absmax(bits)
    kept = donor.compress(lambda block: delta[block], base)
    expected = base.float() + torch.from_numpy(quantised(delta.numpy(), bits))
    assert torch.equal(donor.donor(base, kept)[:], expected)
    assert sum(t.numel() * t.element_size() for t in kept) == donor.n_bytes(shape)
    operand = donor.donor(base, kept)
    for size in (1, 64, 129, 1000):  # blocks that begin and end inside a tile
        for block in blocks(base, size):
            assert torch.equal(operand[block], expected[block])


def test_bands_of_a_large_matrix_are_quantised_alike():
    base, delta = base_and_delta((1200, 256))  # more than one band
    kept = Absmax(4).compress(lambda block: delta[block], base)
    assert torch.equal(Absmax(4).donor(base, kept)[:] - base.float(), (base.float() + torch.from_numpy(
        quantised(delta.numpy(), 4))) - base.float())  # fmt: skip


@pytest.mark.parametrize("rank", [1, 6])
def test_low_rank_is_as_near_as_the_svd(rank):
    rng = np.random.default_rng(1)
    u, v = np.linalg.qr(rng.normal(size=(60, 40)))[0], np.linalg.qr(rng.normal(size=(40, 40)))[0]
    values = 0.7 ** np.arange(40)
    delta = torch.from_numpy(((u * values) @ v.T).astype(np.float32))
    base = torch.zeros(60, 40)
    kept = LowRankDelta(rank).compress(lambda block: delta[block], base)
    left = (LowRankDelta(rank).donor(base, kept)[:] - delta).norm().item()
    best = np.sqrt((values[rank:] ** 2).sum())  # Eckart and Young
    assert best * 0.999 <= left <= best * 1.01
    assert sum(t.numel() * t.element_size() for t in kept) == LowRankDelta(rank).n_bytes((60, 40))
    again = LowRankDelta(rank).compress(lambda block: delta[block], base)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_errors_are_relative_and_by_source():
    base, delta = base_and_delta((4, 256))
    donors = {"a": (base.float() + delta), "b": (base.float() + 2 * delta)}
    deltas = Deltas(Absmax(4))
    for name, donor in donors.items():
        for part in ("first", "second"):
            deltas.donor(name, part, base, lambda donor=donor: donor)
    for name, donor in donors.items():
        exact = (donor - base.float()).numpy()
        expected = np.linalg.norm(quantised(exact, 4) - exact) / np.linalg.norm(exact)
        assert deltas.errors[name] == pytest.approx(expected, rel=1e-3)


def test_each_donor_is_read_once():
    base, delta = base_and_delta((4, 256))
    deltas, reads = Deltas(Absmax(8)), []
    for _ in range(2):
        deltas.donor("a", "part", base, lambda: reads.append(1) or base.float() + delta)
    assert len(reads) == 1


def test_what_is_not_worth_it_stays_exact():
    assert not Deltas(Absmax(8)).covers((1, 4096))
    assert Deltas(Absmax(8)).covers((64, 4096))
    assert not Deltas(LowRankDelta(64)).covers((64, 64))
    assert Deltas(LowRankDelta(4)).covers((64, 64))


@pytest.mark.parametrize("wrong", ["int3", "low_rank", "low_rank(0)", "low_rank(4096)", ""])
def test_other_names_are_refused(wrong):
    with pytest.raises(ValueError, match=r"expected exact, int8, int4 or low_rank\(RANK\)"):
        parse(wrong)
    assert parse("low_rank(8)") == LowRankDelta(8) and parse("exact") is None and parse("int4") == Absmax(4)


class TestCandidates:
    """Written into slots, on a checkpoint of experts."""

    def writer(self, parents, **options):
        checkpoints = {name: Checkpoint.open(path) for name, path in parents.items()}
        slots = {n: torch.full(e.shape, torch.nan) for n, e in checkpoints["base"].entries.items()}
        return checkpoints, slots, Materializer(checkpoints, slots, base="base", **options)

    def recipe(self, parents, *rules, base="base"):
        return Recipe({name: Source(str(path)) for name, path in parents.items()}, base, "a", rules)

    @pytest.mark.parametrize("residency", [Residency.DEVICE, Residency.DISK])
    def test_are_the_base_plus_what_is_left_of_differences(self, moe_parents, residency):
        checkpoints, slots, writer = self.writer(moe_parents, deltas="int4", residency=residency)
        recipe = self.recipe(moe_parents, Rule("linear", {"a": 0.25, "b": 0.5}))
        report = writer.write({**recipe.to_dict(), "compressed": True})
        assert report.delta_errors.keys() == {"a", "b"} and all(0.01 < e < 0.3 for e in report.delta_errors.values())
        for name, slot in slots.items():
            base, a, b = (checkpoints[source].tensor(name).float() for source in ("base", "a", "b"))
            if base.ndim > 1:
                a, b = (base + torch.from_numpy(quantised((donor - base).numpy(), 4)) for donor in (a, b))
            expected = (base * 0.25 + a * 0.25) + b * 0.5
            assert torch.equal(slot, expected.to(checkpoints["base"].tensor(name).dtype).float()), name

    def test_are_exact_again_when_asked_and_when_copied(self, moe_parents):
        checkpoints, slots, writer = self.writer(moe_parents, deltas="int8")
        mixed, copied = Rule("ties", {"a": 0.3, "b": 0.4}, knobs={"density": 0.5}), Rule("linear", {"b": 1.0})
        recipe = self.recipe(moe_parents, mixed)
        exact = dict(Materializer(checkpoints).stream(recipe))
        n_parts = len(writer.layout.parts)
        for compressed in (True, False, True, False):
            report = writer.write({**recipe.to_dict(), "compressed": compressed})
            assert report.n_written == n_parts and bool(report.delta_errors) == compressed
            assert all(torch.equal(slots[n], t.float()) for n, t in exact.items()) != compressed
        writer.write({**self.recipe(moe_parents, copied).to_dict(), "compressed": True})
        assert all(torch.equal(slots[n], checkpoints["b"].tensor(n).float()) for n in exact)

    def test_donors_are_read_once_and_not_kept(self, moe_parents, monkeypatch):
        _, _, writer = self.writer(moe_parents, deltas="int8", residency=Residency.DEVICE)
        reads, read = [], Checkpoint.tensor

        def counted(self, piece, cut=None, **more):
            reads.append((self.path, piece))
            return read(self, piece, cut, **more)

        monkeypatch.setattr(Checkpoint, "tensor", counted)
        for share in (0.25, 0.5):
            recipe = self.recipe(moe_parents, Rule("linear", {"a": share}, tensors=("*.weight",)))
            writer.write({**recipe.to_dict(), "compressed": True})
        matrices = [r for r in reads if r[0] == moe_parents["a"] and "norm" not in r[1]]
        assert len(matrices) == len(set(matrices)) > 0
        assert {key[0] for key in writer._pieces._kept} == {moe_parents["base"]}


COMPRESS = """
import torch
from evo.deltas import Deltas, parse

def memory():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

torch.set_num_threads(1)
base, donor = torch.randn(2, 700, 1000).bfloat16()
deltas = Deltas(parse("int8"))
deltas.donor("a", "first", base, lambda: donor)
kept = [bytearray(b"x" * 100_000) for _ in range(2400)]
del kept[::2]
before = memory()
for part in range(25):
    deltas.donor("a", part, base, lambda: donor)
print(memory() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc, whose heap it is about")
def test_compressing_gives_back_what_the_heap_holds_between_what_is_kept():
    """120 MB are free between as many that are not, where no matrix fits; 70 MB of differences are compressed."""
    run = subprocess.run([sys.executable, "-c", COMPRESS], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(run.stdout) < 25 * Absmax(8).n_bytes((700, 1000)) - 50_000_000
