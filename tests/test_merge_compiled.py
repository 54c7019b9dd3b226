"""Compiled loops have the bits of merges on tensors, and candidates share them."""

import functools
import logging
import platform
from dataclasses import replace

import pytest
import torch

from evo.checkpoint import Checkpoint
from evo.deltas import parse
from evo.encodings.fp8_blocks import Fp8Blocks
from evo.materializer import Materializer
from evo.merge import METHODS, Method, base_at_zero, cpp_loop, get_method, kernels
from evo.merge.apply import PartMerge
from evo.merge.blocks import as_matrix
from evo.merge.cpp_loop import find_compiler
from evo.merge.kernels import Fused, fuse, record
from evo.merge.noise import stream_key
from evo.merge.tape import Tape, Untraceable
from search_spaces.recipe import Recipe, Rule, Source
from tests.merging import SETTINGS, arguments_of

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")
COMPILED = ["linear", "ties", "dare_ties", "della", "sce", "model_stock", "ram", "arcee_fusion", "nearswap"]
"""Between them they use every operation that a loop knows."""
ON_TENSORS: set[str] = set()
"""Methods of ours that no loop can do; they run on tensors, slower and with the same bits."""
DELTAS = ["int8", "int4", "low_rank(5)"]
"""How donors are compressed."""


def part_merge(name, dtype=torch.bfloat16, shape=(37, 1031), coefficients=(0.3, 0.45), scale=1.0, device="cpu"):
    """A merge of random matrices that hold zeros of both signs, denormals, and equal magnitudes."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(shape, generator=generator) * scale
    donors = {d: base + 0.1 * scale * torch.randn(shape, generator=generator) for d in "ab"}
    for tensor in (base, *donors.values()):
        flat = tensor.view(-1)
        flat[torch.randint(flat.numel(), (flat.numel() // 50,), generator=generator)] = -0.0
        flat[torch.randint(flat.numel(), (flat.numel() // 50,), generator=generator)] = 3e-39
    base, donors = base.to(device, dtype), {d: donor.to(device, dtype) for d, donor in donors.items()}
    arguments = arguments_of(name, donors, base, SETTINGS.get(name, {}))
    arguments.pop("noise", None)
    keys = [stream_key(0, d) for d in donors] if get_method(name).random else []
    matrices = [as_matrix(donor) for donor in donors.values()]
    return PartMerge(get_method(name), as_matrix(base), matrices, coefficients, arguments, keys)


def in_fp8(merge, names=("base", "donors"), block=(16, 128), first=0):
    """The same merge of matrices stored as FP8, or of some of them, or from some row on."""

    def stored(matrix):
        encoding = Fp8Blocks(block)
        pieces = encoding.encode(matrix.shape, matrix.device, lambda at: matrix[at].float(), 1 << 16)
        return encoding.operand([pieces[0][first:], pieces[1][first // block[0] :]])

    changed = {"base": stored(merge.base), "donors": [stored(donor) for donor in merge.donors]}
    return replace(merge, **{name: changed[name] for name in names})


def stored(merge):
    """The dtype of the result: the base's, float32 where that has yet to be encoded."""
    return merge.base.dtype if isinstance(merge.base, torch.Tensor) else torch.float32


def on_tensors(merge):
    n_rows, n_columns = merge.base.shape
    return merge.block((slice(0, n_rows), slice(0, n_columns))).to(stored(merge))


def fused_with(merge, operands, **more):
    """Its loop over other operands."""
    return fuse(merge.method, operands, merge.coefficients, merge.arguments, merge.keys, dtype=stored(merge), **more)


def loop_of(merge):
    fused = fused_with(merge, [merge.base, *merge.donors])
    assert fused is not None
    return fused


@functools.cache
def why_on_tensors(name):
    """Which operation of a method no loop can do; None if it is recorded."""
    merge = part_merge(name)
    try:
        record(merge.method, [merge.base, *merge.donors], merge.coefficients, merge.arguments)
    except Untraceable as error:
        return str(error)
    return None


def skip_unless_recorded(name):
    if why := why_on_tensors(name):
        pytest.skip(f"{name} runs on tensors: {why}")


def bits(tensor):
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@needs_compiler
@pytest.mark.parametrize("name", COMPILED)
def test_same_bits(name):
    merge = part_merge(name)
    found = torch.empty_like(merge.base)
    loop_of(merge).run(found)
    assert torch.equal(bits(found), bits(on_tensors(merge)))


@needs_compiler
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stored", [("base", "donors"), ("donors",), ("base",)])
def test_same_bits_of_what_is_stored_as_fp8(name, stored):
    """Result in float32, to be encoded, where the base is; else in the base's dtype."""
    skip_unless_recorded(name)
    merge = in_fp8(part_merge(name), stored)
    fused = loop_of(merge)
    assert fused.dtype == (torch.float32 if "base" in stored else torch.bfloat16)
    assert torch.equal(bits(fused.result()), bits(on_tensors(merge).view(-1)))


@needs_compiler
@pytest.mark.parametrize("block", [(16, 128), (1, 8), (128, 300), (5, 1031)])
def test_blocks_of_fp8_may_have_any_shape_and_merges_start_anywhere(block):
    merge = in_fp8(part_merge("della", shape=(40, 1031)), block=block)
    expected, fused = on_tensors(merge), loop_of(merge)
    whole = expected.view(-1)
    for begin in (0, 1, 127, 1031, 20_000):
        found = torch.empty(len(whole) - begin)
        fused.run(found, begin)
        assert torch.equal(bits(found), bits(whole[begin:]))
    assert torch.equal(fused.block((slice(3, 9), slice(0, 1031))), expected[3:9])
    assert torch.equal(fused.block((slice(7, 8), slice(100, 777))), expected[7:8, 100:777])


def compressed(merge, deltas, first=0):
    """The same merge of donors that are kept as compressed differences, or from some row on, of low rank."""
    how, base = parse(deltas), merge.base
    kept = [how.compress(lambda at, donor=donor: donor[at].float() - base[at].float(), base) for donor in merge.donors]
    if first:
        base, kept = base[first:], [(left[first:], right) for left, right in kept]
    return replace(merge, base=base, donors=[how.donor(base, one) for one in kept])


@needs_compiler
@pytest.mark.parametrize("deltas", DELTAS)
@pytest.mark.parametrize("name", ["linear", "della"])
def test_same_bits_of_donors_that_are_compressed(name, deltas):
    merge = compressed(part_merge(name, shape=(37, 1032)), deltas)
    for one in (merge, in_fp8(merge, ("base",))):
        fused, whole = loop_of(one), on_tensors(one).view(-1)
        for begin in (0, 1, 1032, 20_001):
            found = torch.empty_like(whole[begin:])
            fused.run(found, begin)
            assert torch.equal(bits(found), bits(whole[begin:]))


def test_rows_of_an_odd_length_are_not_compiled_where_differences_share_bytes(monkeypatch):
    monkeypatch.setattr(kernels, "FUSE_FROM_ELEMENTS", 0)
    assert compressed(part_merge("linear", shape=(37, 1031)), "int4").compiled(torch.bfloat16) is None


def floats_around_those_of_e4m3():
    """Every bfloat16 number; and all E4M3 numbers, the middles between them, and the float32 numbers next to these."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    found = [torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()]
    for exact in (codes, (codes[1:] + codes[:-1]) / 2):
        found += [sign * exact.nextafter(torch.tensor(end)) for sign in (1, -1) for end in (-1e9, 1e9)]
        found += [exact, -exact]
    found = torch.cat(found)
    return found[~(found.abs() > 464.0)][None]  # versions of torch differ on what is out of range; it is cut off before


@needs_compiler
def test_e4m3_is_rounded_and_read_as_torch_does(monkeypatch):
    monkeypatch.setattr(kernels, "FUSE_FROM_ELEMENTS", 0)
    values = floats_around_those_of_e4m3()
    expected = values.to(torch.float8_e4m3fn)
    tape = Tape()
    fused = kernels._fused(tape, tape.key(tape.read(values)), torch.float8_e4m3fn, [], True, 0)
    found = fused.result()[None]
    number = ~expected.float().isnan()
    assert torch.equal(found.view(torch.uint8)[number], expected.view(torch.uint8)[number])
    assert found.float()[~number].isnan().all()
    tape, back = Tape(), found[number][None].contiguous()
    fused = kernels._fused(tape, tape.key(tape.read(back)), torch.float32, [], True, 0)
    assert torch.equal(bits(fused.result()), bits(back.float()[0]))


@needs_compiler
@pytest.mark.parametrize("name", ["dare_ties", "della"])
def test_some_rows_of_fp8_are_those_of_the_whole(name):
    merge = part_merge(name)
    expected, rows = on_tensors(in_fp8(merge)), in_fp8(merge, first=16)
    fused = fused_with(rows, [rows.base, *rows.donors], first=16 * 1031)
    assert torch.equal(bits(fused.result()), bits(expected[16:].reshape(-1)))


@needs_compiler
@pytest.mark.parametrize("name", ["linear", "della"])
def test_some_rows_of_low_rank_donors_are_those_of_the_whole(name):
    merge = part_merge(name)
    expected, rows = on_tensors(compressed(merge, "low_rank(5)")), compressed(merge, "low_rank(5)", first=7)
    fused = fused_with(rows, [rows.base, *rows.donors], first=7 * 1031)
    assert torch.equal(bits(fused.result()), bits(expected[7:].reshape(-1)))


@needs_compiler
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the other path is for processors of this kind"
)
def test_same_bits_where_tables_do_not_fit_into_registers(monkeypatch):
    monkeypatch.setattr(cpp_loop, "_FLAGS", (*cpp_loop._FLAGS, "-mno-avx512f"))
    monkeypatch.setattr(kernels, "_loops", {})
    test_same_bits("della")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_a_number_stays_so(dtype):
    merge = part_merge("della", dtype)
    merge.base[0, :64], merge.donors[0][0, :32] = torch.inf, -torch.inf
    found = torch.empty_like(merge.base)
    loop_of(merge).run(found)
    assert torch.equal(found.isnan(), on_tensors(merge).isnan()) and found.isnan().sum() >= 64


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-38, 1e4])
def test_same_bits_in_other_dtypes_and_at_both_ends_of_their_range(dtype, scale):
    merge = part_merge("ties", dtype, scale=scale, coefficients=(0.7, 1.2))
    found = torch.empty_like(merge.base)
    loop_of(merge).run(found)
    assert torch.equal(bits(found), bits(on_tensors(merge)))


@needs_compiler
@pytest.mark.parametrize("name", ["linear", "della"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2049), (3, 1), (5, 7), (2, 1024)])
def test_same_bits_in_every_shape_and_from_every_element(name, shape):
    merge = part_merge(name, shape=shape)
    expected = on_tensors(merge).view(-1)
    for begin in {0, 1, expected.numel() // 2}:
        found = torch.empty_like(expected[begin:])
        loop_of(merge).run(found, begin)
        assert torch.equal(bits(found), bits(expected[begin:]))


@needs_compiler
def test_threads_do_not_change_a_bit(monkeypatch):
    merge = part_merge("della")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found = torch.empty_like(merge.base)
    loop_of(merge).run(found)
    assert torch.equal(bits(found), bits(on_tensors(merge)))


@needs_compiler
@pytest.mark.parametrize("target", ["same", "float32", "transposed"])
def test_a_slot_is_written_directly_where_it_can_hold_the_bits(target, monkeypatch):
    monkeypatch.setattr(kernels, "FUSE_FROM_ELEMENTS", 0)
    merge = part_merge("della")
    slot = torch.empty_like(merge.base, dtype=torch.float32 if target == "float32" else None)
    if target == "transposed":
        slot = torch.empty(merge.base.shape[::-1], dtype=merge.base.dtype).T
    fused, made = merge.compiled(torch.bfloat16), []
    monkeypatch.setattr(Fused, "result", lambda self, result=Fused.result: made.append(1) or result(self))
    fused.into(slot)
    assert bool(made) == (target != "same")
    assert torch.equal(slot.to(merge.base.dtype), on_tensors(merge))


def test_methods_are_recorded():
    found = {name: why for name in METHODS if (why := why_on_tensors(name))}
    assert set(found) == ON_TENSORS, (
        f"{found}: use the operations at the top of evo/merge/tape.py, or, if it has to run on tensors, name it in "
        "ON_TENSORS above"
    )


@pytest.mark.parametrize("name", METHODS)
def test_candidates_share_a_loop(name):
    """Other coefficients and statistics give the same operations."""
    skip_unless_recorded(name)
    keys = set()
    for coefficients, scale in (((0.3, 0.45), 4.0), ((0.12, 0.41), 5.0)):
        merge = part_merge(name, coefficients=coefficients, scale=scale)
        keys.add(record(merge.method, [merge.base, *merge.donors], coefficients, merge.arguments)[1])
    assert len(keys) == 1


def test_a_missing_compiler_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(cpp_loop, "find_compiler", lambda: None)
    monkeypatch.setattr(kernels, "FUSE_FROM_ELEMENTS", 0)
    kernels._loops.clear()
    kernels._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for name in ("linear", "nearswap"):
            assert part_merge(name).compiled(torch.bfloat16) is None
    kernels._loops.clear()
    assert [record.message.count("no C++ compiler") for record in caplog.records] == [1]


@needs_compiler
def test_a_loop_with_other_bits_is_not_used(monkeypatch, caplog):
    """Such as from a compiler that contracts a product and a sum, whatever it has been told."""
    source_of = cpp_loop.source_of
    monkeypatch.setattr(cpp_loop, "source_of", lambda *key: source_of(*key).replace("+ 0x7fffu", "+ 0x7ffeu"))
    monkeypatch.setattr(kernels, "FUSE_FROM_ELEMENTS", 0)
    kernels._loops.clear()
    assert part_merge("linear").compiled(torch.bfloat16) is None
    kernels._loops.clear()
    assert "other bits" in caplog.text


@needs_compiler
def test_a_loop_that_does_not_run_is_not_used(monkeypatch, caplog):
    """As Triton's, which are compiled when they are first run."""
    monkeypatch.setattr(cpp_loop.CppLoop, "run", lambda *args: args[99])
    monkeypatch.setattr(kernels, "FUSE_FROM_ELEMENTS", 0)
    kernels._loops.clear()
    assert part_merge("linear").compiled(torch.bfloat16) is None
    kernels._loops.clear()
    assert "does not run" in caplog.text


@needs_compiler
def test_a_loop_that_found_no_memory_is_tried_again(monkeypatch):
    def run(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(kernels, "FUSE_FROM_ELEMENTS", 0)
    kernels._loops.clear()
    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(cpp_loop.CppLoop, "run", run)
        part_merge("linear").compiled(torch.bfloat16)
    assert part_merge("linear").compiled(torch.bfloat16) is not None


def test_compiling_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(kernels, "FUSE_FROM_ELEMENTS", 0)
    monkeypatch.setenv(kernels.OFF, "1")
    assert part_merge("linear").compiled(torch.bfloat16) is None


@needs_compiler
def test_models_and_exports_get_the_same_bits_with_and_without_a_compiler(moe_parents, monkeypatch):
    checkpoints = {name: Checkpoint.open(path) for name, path in moe_parents.items()}
    sources = {name: Source(str(path)) for name, path in moe_parents.items()}
    recipe = Recipe(sources, "b", "a", (Rule("linear", {"a": 0.3}),))
    on_tensors = dict(Materializer(checkpoints).stream(recipe))
    slots = {name: torch.empty_like(tensor) for name, tensor in on_tensors.items()}
    monkeypatch.setattr(kernels, "FUSE_FROM_ELEMENTS", 0)
    report = Materializer(checkpoints, slots).write(recipe.to_dict())
    assert report.n_compiled == report.n_written > 0
    streamed = dict(Materializer(checkpoints).stream(recipe))
    for name, tensor in on_tensors.items():
        assert torch.equal(slots[name], tensor) and torch.equal(streamed[name], tensor), name


def by(merge):
    """A merge of random matrices with a method of somebody's own."""
    return replace(part_merge("linear"), method=Method(merge, copy_of=base_at_zero))


NOT_RECORDED = {
    "equal elements": lambda donors, base, c: base + donors[1] * (donors[0] == base) * c[1],
    "unequal elements": lambda donors, base, c: base + donors[1] * (donors[0] != base) * c[1],
    "an operator for comparisons": lambda donors, base, c: base + donors[1] * (donors[0] > base) * c[1],
    "an argument by name": lambda donors, base, c: base.add(donors[1], alpha=c[1]),
    "a function of torch": lambda donors, base, c: torch.where(donors[0] == base, donors[0], base) * c[0],
    "a branch on elements": lambda donors, base, c: base if (donors[0] - base).sum() else donors[0],
    "what it was given": lambda donors, base, c: torch.stack(list(donors)).amax(0),
}


@pytest.mark.parametrize("merge", NOT_RECORDED.values(), ids=NOT_RECORDED)
def test_what_cannot_be_recorded_runs_on_tensors(monkeypatch, merge):
    monkeypatch.setattr(kernels, "FUSE_FROM_ELEMENTS", 0)
    one = by(merge)
    assert one.compiled(torch.bfloat16) is None
    floats, base = [donor.float() for donor in one.donors], one.base.float()
    whole = (slice(0, 37), slice(0, 1031))
    assert torch.equal(one.block(whole), merge(floats, base, one.coefficients))


@pytest.mark.parametrize(
    ("merge", "got"),
    [
        (lambda donors, base, c: base.sum(1, keepdim=True), r"torch.float32 \[37, 1\]"),
        (lambda donors, base, c: base.reshape(-1), r"torch.float32 \[38147\]"),
        (lambda donors, base, c: base.double(), r"torch.float64 \[37, 1031\]"),
        (lambda donors, base, c: None, "NoneType"),
    ],
)
def test_a_method_that_returns_something_else(merge, got):
    with pytest.raises(TypeError, match=rf"<lambda>: expected a float32 tensor \[37, 1031\], like the base, got {got}"):
        by(merge).block((slice(0, 37), slice(0, 1031)))
