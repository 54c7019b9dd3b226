"""Triton kernels have the bits of merges on tensors: interpreted on the CPU, and run where there is a GPU."""

import re

import pytest
import torch

from evo.merge import METHODS, kernels
from evo.merge.kernels import record
from evo.merge.tape import Tape
from evo.merge.triton_kernel import TritonKernel
from tests.test_merge_compiled import (
    DELTAS,
    bits,
    compressed,
    floats_around_those_of_e4m3,
    fused_with,
    in_fp8,
    on_tensors,
    part_merge,
    skip_unless_recorded,
)

pytest.importorskip("triton")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Where merges are compiled to Triton kernels; on the CPU its interpreter runs them, with numpy."""
    monkeypatch.setattr(kernels, "_loops", {})
    if request.param == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setitem(kernels.LOOPS, "cpu", kernels.LOOPS["cuda"])
    return request.param


def merge_on(device, *args, **kwargs):
    """A merge compiled for a device, where it is measured, too, and what the same is on tensors of the CPU."""
    merge = part_merge(*args, device=device, **kwargs)
    return fused_with(merge, [merge.base, *merge.donors]), on_tensors(part_merge(*args, **kwargs))


def found_by(fused):
    return fused.result().cpu().view(-1)


@pytest.mark.parametrize("name", METHODS)
def test_same_bits(device, name):
    skip_unless_recorded(name)
    fused, expected = merge_on(device, name)
    assert torch.equal(bits(found_by(fused)), bits(expected.view(-1)))


@pytest.mark.parametrize("name", ["linear", "della"])
@pytest.mark.parametrize("block", [(16, 128), (5, 300)])
def test_same_bits_of_what_is_stored_as_fp8(device, name, block):
    merge = in_fp8(part_merge(name), block=block)
    on_device = in_fp8(part_merge(name, device=device), block=block)
    operands = [on_device.base, *on_device.donors]
    fused = fused_with(on_device, operands)
    assert torch.equal(bits(found_by(fused)), bits(on_tensors(merge).view(-1)))


@pytest.mark.parametrize("deltas", DELTAS)
def test_same_bits_of_donors_that_are_compressed(device, deltas):
    merge = compressed(part_merge("linear", shape=(37, 1032), device=device), deltas)
    operands = [merge.base, *merge.donors]
    fused = fused_with(merge, operands)
    assert torch.equal(bits(found_by(fused)), bits(on_tensors(merge).cpu().view(-1)))


def test_e4m3_is_rounded_as_torch_does(device):
    values, tape = floats_around_those_of_e4m3().to(device), Tape()
    fused = kernels._fused(tape, tape.key(tape.read(values)), torch.float8_e4m3fn, [], True, 0)
    expected, found = values.cpu()[0].to(torch.float8_e4m3fn), fused.result().cpu()
    number = ~expected.float().isnan()
    assert torch.equal(found.view(torch.uint8)[number], expected.view(torch.uint8)[number])
    assert found.float()[~number].isnan().all()


@pytest.mark.parametrize("dtype", kernels.WRITTEN)
def test_what_is_not_a_number_stays_so(device, dtype):
    """A GPU's arithmetic makes the first of these of what is none, a processor's the second; the rest are in files."""
    nan = torch.tensor([0x7FFFFFFF, -0x400000, 0x7FC00000, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    values, tape = torch.cat([nan, torch.tensor([1.0, -0.0])])[None].to(device), Tape()
    fused = kernels._fused(tape, tape.key(tape.read(values)), dtype, [], True, 0)
    found = found_by(fused).float()
    assert found[: len(nan)].isnan().all() and found[len(nan) :].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-38, 1e4])
def test_same_bits_in_other_dtypes_and_at_both_ends_of_their_range(device, dtype, scale):
    fused, expected = merge_on(device, "ties", dtype, scale=scale, coefficients=(0.7, 1.2))
    assert torch.equal(bits(found_by(fused)), bits(expected.view(-1)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2049), (3, 1), (5, 7), (2, 1024)])
def test_same_bits_in_every_shape(device, shape):
    fused, expected = merge_on(device, "della", shape=shape)
    assert torch.equal(bits(found_by(fused)), bits(expected.view(-1)))


@pytest.mark.parametrize("name", ["linear", "della"])
def test_an_empty_tensor_is_merged_to_one(device, name):
    merge = part_merge(name, shape=(4, 8), device=device)
    operands = [matrix[:, :0].contiguous() for matrix in (merge.base, *merge.donors)]
    assert fused_with(merge, operands).result().numel() == 0


@pytest.mark.parametrize("name", ["dare_ties", "della"])
def test_some_rows_of_a_part_are_those_of_the_whole(device, name):
    merge, (first, last) = part_merge(name, device=device), (5, 20)
    width = merge.base.shape[1]
    rows = [tensor[first:last].contiguous() for tensor in (merge.base, *merge.donors)]
    fused = fused_with(merge, rows, first=first * width)
    assert torch.equal(bits(found_by(fused)), bits(on_tensors(part_merge(name))[first:last].reshape(-1)))
    start = 3 * width
    piece = torch.empty(4 * width + 17, dtype=fused.dtype, device=device)
    fused.run(piece, start)
    assert torch.equal(bits(piece.cpu()), bits(fused.result().cpu()[start : start + len(piece)]))


def compiled_for_a_gpu(merge, result):
    """PTX of a merge to some dtype."""
    tape, nodes = record(merge.method, [merge.base, *merge.donors], merge.coefficients, merge.arguments)
    return TritonKernel(nodes, (*(tensor.dtype for tensor in tape.inputs), result)).compiled_for(90)["ptx"]


@pytest.mark.parametrize("name", METHODS)
def test_what_is_compiled_for_a_gpu_rounds_every_operation_by_itself_and_reads_16_bytes_at_a_time(
    name, tmp_path, monkeypatch
):
    skip_unless_recorded(name)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = compiled_for_a_gpu(part_merge(name), torch.bfloat16)
    assert not re.search(r"\b(fma|div\.full|div\.approx|rcp)\b|\.ftz", ptx)
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx
    assert not re.search(r"(ld|st)\.global\.b16", ptx)


@pytest.mark.parametrize("stored", ["fp8", "int8"])
def test_numbers_of_a_byte_are_read_several_at_a_time(stored, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    merge = part_merge("linear", shape=(64, 512))
    merge = in_fp8(merge) if stored == "fp8" else compressed(merge, "int8")
    ptx = compiled_for_a_gpu(merge, torch.float32 if stored == "fp8" else torch.bfloat16)
    assert not re.search(r"\b(fma|div\.full|div\.approx|rcp)\b|\.ftz", ptx)
    assert not re.search(r"(ld|st)\.global\.b(8|16)", ptx)


def test_products_of_low_rank_are_of_doubles_and_read_16_bytes_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    merge = compressed(part_merge("linear", shape=(64, 512)), "low_rank(16)")
    ptx = compiled_for_a_gpu(merge, torch.bfloat16)
    assert "mul.rn.f64" in ptx or "mul.f64" in ptx
    assert not re.search(r"fma\.rn\.f32|\.ftz", ptx)
    assert "ld.global.v4.b32" in ptx and not re.search(r"(ld|st)\.global\.b16", ptx)
