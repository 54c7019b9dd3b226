import contextlib
import json
import shutil
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from evo.checkpoint import INDEX_FILE, Checkpoint, CheckpointError, check_compatible
from tests.conftest import make_checkpoint


@pytest.fixture
def copy(moe_parents, tmp_path):
    return shutil.copytree(moe_parents["a"], tmp_path / "copy")


def first_shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


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

    @settings(max_examples=60, deadline=None)
    @given(data=st.binary(max_size=200))
    def test_any_bytes_are_an_error_and_no_crash(self, tmp_path_factory, data):
        folder = tmp_path_factory.mktemp("fuzz")
        (folder / "model.safetensors").write_bytes(data)
        with contextlib.suppress(CheckpointError):
            assert Checkpoint.open(folder).headers == {}  # the few byte strings that are a valid empty file


class TestCompatible:
    def test_siblings_pass(self, parents):
        check_compatible({name: Checkpoint.open(path) for name, path in parents.items()})

    def test_all_differences_are_listed(self, moe_parents, copy):
        shard = first_shard(copy)
        tensors = load_file(shard)
        name = next(iter(tensors))
        tensors[name] = tensors[name].float()
        save_file(tensors, shard, metadata={"format": "pt"})
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 999}))
        with pytest.raises(CheckpointError) as error:
            check_compatible({"a": Checkpoint.open(moe_parents["a"]), "odd": Checkpoint.open(copy)})
        assert f"{name}: BF16" in str(error.value)
        assert "vocab_size" in str(error.value)
        assert "2 difference(s)" in str(error.value)

    def test_another_architecture(self, moe_parents, tmp_path):
        other = make_checkpoint(tmp_path / "llama", "llama", 0)
        with pytest.raises(CheckpointError, match="model_type: 'deepseek_v3' in a, 'llama' in b"):
            check_compatible({"a": Checkpoint.open(moe_parents["a"]), "b": Checkpoint.open(other)})

    def test_another_vocabulary(self, moe_parents, copy):
        text = (copy / "tokenizer.json").read_text()
        (copy / "tokenizer.json").write_text(text.replace('"7":', '"seven":'))
        with pytest.raises(CheckpointError, match="'7', 'seven'"):
            check_compatible({"a": Checkpoint.open(moe_parents["a"]), "b": Checkpoint.open(copy)})
