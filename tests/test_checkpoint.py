import json
import math
import shutil
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from evo.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, CheckpointError
from evo.compatible import check_compatible
from evo.encodings.flaws import find_flaw
from tests.conftest import make_checkpoint
from tests.encoding import first_shard


def test_reads_what_safetensors_reads(parents):
    checkpoint = Checkpoint.open(parents["a"])
    assert len(set(checkpoint.weight_map.values())) > 1  # sharded
    for file in parents["a"].glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.equal(checkpoint.tensor(name), tensor)
            assert checkpoint.headers[name].shape == tuple(tensor.shape)


def test_single_file_and_shards_hold_the_same(tmp_path):
    sharded = Checkpoint.open(make_checkpoint(tmp_path / "s", "llama", 0))
    single = Checkpoint.open(make_checkpoint(tmp_path / "o", "llama", 0, shard="1GB"))
    assert set(single.weight_map.values()) == {"model.safetensors"}
    assert single.headers.keys() == sharded.headers.keys()
    assert all(torch.equal(single.tensor(n), sharded.tensor(n)) for n in single.headers)


def test_digest_follows_content_and_nothing_else(moe_parents, copy):
    assert Checkpoint.open(copy).digest() == Checkpoint.open(moe_parents["a"]).digest()
    (copy / "README.md").write_text("words")
    assert Checkpoint.open(copy).digest() == Checkpoint.open(moe_parents["a"]).digest()
    data = bytearray(first_shard(copy).read_bytes())
    data[-1] ^= 1  # one bit of one weight
    first_shard(copy).write_bytes(data)
    assert Checkpoint.open(copy).digest() != Checkpoint.open(moe_parents["a"]).digest()


def test_digest_follows_the_interface(copy, moe_parents):
    (copy / "chat_template.jinja").write_text("another")
    assert Checkpoint.open(copy).digest() != Checkpoint.open(moe_parents["a"]).digest()


class TestDamage:
    def test_missing_folder(self, tmp_path):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            Checkpoint.open(tmp_path / "nowhere")

    def test_no_weights(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"expected model\.safetensors"):
            Checkpoint.open(tmp_path)

    def test_pickles_are_refused_with_a_hint(self, tmp_path):
        (tmp_path / "pytorch_model.bin").write_bytes(b"x")
        with pytest.raises(CheckpointError, match="save_pretrained"):
            Checkpoint.open(tmp_path)

    def test_missing_shard(self, copy):
        first_shard(copy).unlink()
        with pytest.raises(CheckpointError, match="is missing"):
            Checkpoint.open(copy)

    def test_truncated_shard(self, copy):
        first_shard(copy).write_bytes(first_shard(copy).read_bytes()[:-10])
        with pytest.raises(CheckpointError, match="damaged"):
            Checkpoint.open(copy)

    def test_a_shard_that_is_truncated_after_it_was_opened(self, copy):
        checkpoint, shard = Checkpoint.open(copy), first_shard(copy)
        name = next(name for name, file in checkpoint.weight_map.items() if file == shard.name)
        shard.write_bytes(shard.read_bytes()[:-10])
        with pytest.raises(CheckpointError, match=f"tensor {name} cannot be read"):
            checkpoint.tensor(name)

    def test_header_longer_than_the_file(self, copy):
        first_shard(copy).write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
        with pytest.raises(CheckpointError, match="damaged"):
            Checkpoint.open(copy)

    @pytest.mark.parametrize("target", ["../evil.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", 3])
    def test_index_that_points_outside(self, copy, target):
        index = json.loads((copy / INDEX_FILE).read_text())
        index["weight_map"][next(iter(index["weight_map"]))] = target
        (copy / INDEX_FILE).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="plain name"):
            Checkpoint.open(copy)

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}'])
    def test_broken_index(self, copy, text):
        (copy / INDEX_FILE).write_text(text)
        with pytest.raises(CheckpointError, match=r"JSON|weight_map"):
            Checkpoint.open(copy)

    def test_tensor_in_a_shard_that_the_index_does_not_know(self, copy):
        index = json.loads((copy / INDEX_FILE).read_text())
        gone = next(iter(index["weight_map"]))
        del index["weight_map"][gone]
        (copy / INDEX_FILE).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=gone.replace(".", r"\.")):
            Checkpoint.open(copy)

    def test_shards_beside_a_whole_file(self, copy, tmp_path):
        whole = make_checkpoint(tmp_path / "whole", "deepseek_v3", 1, shard="1GB")
        shutil.copy(whole / SINGLE_FILE, copy)
        with pytest.raises(CheckpointError, match="holds both"):
            Checkpoint.open(copy)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("quantization_config", "fp8"),
            ("quantization_config", {"quant_method": 5}),
            ("text_config", []),
            ("num_hidden_layers", "3"),
        ],
    )
    def test_a_config_of_other_types(self, copy, key, value):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(CheckpointError, match=key):
            Checkpoint.open(copy).layout  # noqa: B018

    def test_a_tensor_in_two_shards(self, copy):
        first, second = sorted(copy.glob("*.safetensors"))[:2]
        name = next(iter(load_file(first)))
        save_file({**load_file(second), name: load_file(first)[name]}, second)
        with pytest.raises(CheckpointError, match=f"{name} is both in {second.name} and in {first.name}"):
            Checkpoint.open(copy)

    def test_a_tensor_twice_in_a_header(self, tmp_path):
        entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
        (tmp_path / "model.safetensors").write_bytes(with_header(f"{{{entry}, {entry}}}", b"1234"))
        with pytest.raises(CheckpointError, match="'a' is listed twice"):
            Checkpoint.open(tmp_path)

    def test_a_tensor_twice_in_an_index(self, copy):
        text = (copy / INDEX_FILE).read_text()
        line = next(line for line in text.splitlines() if ".safetensors" in line)
        (copy / INDEX_FILE).write_text(text.replace(line, f"{line.rstrip(',')},\n{line}", 1))
        with pytest.raises(CheckpointError, match="is listed twice"):
            Checkpoint.open(copy)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_numbers_that_are_none(self, copy, value):
        shard = first_shard(copy)
        tensors = load_file(shard)
        name = next(iter(tensors))
        tensors[name].view(-1)[3] = value
        save_file(tensors, shard)
        checkpoint = Checkpoint.open(copy)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=f"{shard.name}: tensor {name} holds (NaN|Inf)"):
                checkpoint.tensor(name)

    @pytest.mark.parametrize(
        "text", ["[" * 100_000, "[]", '{"a": 1, "a": 2}', "\x00", '{"model": [1]}', '{"model": {"vocab": {"a": [1]}}}']
    )
    @pytest.mark.parametrize("file", ["config.json", "tokenizer.json", INDEX_FILE])
    def test_broken_json(self, copy, moe_parents, file, text):
        (copy / file).write_text(text)
        with pytest.raises(CheckpointError, match=r"JSON|expected|fast tokenizer|differ"):
            check_compatible({"a": Checkpoint.open(moe_parents["a"]), "copy": Checkpoint.open(copy)})


def with_header(header, data=b""):
    return struct.pack("<Q", len(header.encode())) + header.encode() + data


class TestFuzz:
    """Whatever the bytes: a CheckpointError, or tensors that are bytes of the file."""

    FILE = save({"a": torch.arange(6.0).view(2, 3), "bb": torch.ones(3, dtype=torch.bfloat16), "c": torch.zeros(0, 4)})

    def read(self, folder, data):
        (folder / "model.safetensors").write_bytes(data)
        try:
            checkpoint = Checkpoint.open(folder)
        except CheckpointError:
            return
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        for name in checkpoint.headers:
            try:
                tensor = checkpoint.tensor(name)
            except CheckpointError:
                continue
            start, end = header[name]["data_offsets"]
            assert bytes(tensor.reshape(-1).view(torch.uint8).numpy()) == data[8 + size + start : 8 + size + end]

    @settings(max_examples=100)
    @given(data=st.binary(max_size=200))
    def test_any_bytes(self, tmp_path_factory, data):
        self.read(tmp_path_factory.getbasetemp(), data)

    @settings(max_examples=300)
    @given(data=st.data())
    def test_mutations_of_a_real_file(self, tmp_path_factory, data):
        mutated = bytearray(self.FILE)
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, len(mutated) - 1))
            if data.draw(st.booleans()):
                mutated[at] = data.draw(st.integers(0, 255))
            else:
                mutated[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
        self.read(tmp_path_factory.getbasetemp(), bytes(mutated))

    @settings(max_examples=300)
    @given(data=st.data())
    def test_headers_that_lie(self, tmp_path_factory, data):
        number = st.sampled_from([-1, 0, 1, 2, 4, 8, 1 << 31, 1 << 62, (1 << 64) - 1, 1 << 64, 1.5, None, "4"])
        entry = st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "F8_E8M0", "F4", "I64", "BOOL", "C64", "X", 3]),
                "shape": st.one_of(st.lists(number, max_size=3), number),
                "data_offsets": st.one_of(st.lists(number, max_size=3), st.tuples(st.just(0), number)),
            }
        )
        header = data.draw(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), entry | number, max_size=2))
        contents = data.draw(st.binary(max_size=16))
        self.read(tmp_path_factory.getbasetemp(), with_header(json.dumps(header), contents))

    @settings(max_examples=100)
    @given(data=st.binary(max_size=100) | st.recursive(
        st.none() | st.text(max_size=9), lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=9), inner)
    ).map(lambda weight_map: json.dumps({"weight_map": weight_map}).encode()))  # fmt: skip
    def test_any_index(self, tmp_path_factory, data):
        folder = tmp_path_factory.getbasetemp() / "index"
        folder.mkdir(exist_ok=True)
        (folder / INDEX_FILE).write_bytes(data)
        with pytest.raises(CheckpointError):
            Checkpoint.open(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_numbers_whose_sum_is_not_are_no_flaw(dtype):
    largest = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert not torch.isfinite(largest.sum()) and find_flaw("x", largest) is None
    assert find_flaw("x", torch.cat([largest, -largest, torch.tensor([torch.inf], dtype=dtype)])) == "Inf"
    assert find_flaw("x", torch.tensor([torch.inf, -torch.inf], dtype=dtype)) == "Inf"
    assert find_flaw("x", torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)) == "NaN"
