"""Shards on disk: what transformers expects, complete or refused by name, and little memory."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsmoe.errors import CheckpointError
from dsmoe.hf.shards import INDEX, SINGLE, ShardReader, ShardWriter, new_folder, parse_size


def tensors(count: int = 6) -> dict[str, torch.Tensor]:
    return {f"t{i}": torch.full((8, 4), float(i)) for i in range(count)}


def write(folder, content, max_shard_size=300) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, max_shard_size)
    for name, tensor in content.items():
        writer.add(name, tensor)
    return writer.finish()


def test_shards_and_index_as_transformers_names_them(tmp_path):
    content = tensors()  # 128 bytes each, two to a shard
    write(tmp_path, content)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_parameters": 6 * 32, "total_size": 6 * 128}
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], content[name])
    reader = ShardReader(tmp_path)
    assert reader.shapes == {name: (8, 4) for name in content}
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in content.items())


def test_one_shard_needs_no_index(tmp_path):
    write(tmp_path, tensors(), max_shard_size=10**6)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    assert len(ShardReader(tmp_path).shapes) == 6


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path):
    content = {"small": torch.zeros(2), "large": torch.ones(500), "other": torch.ones(2)}
    assert len(set(write(tmp_path, content).values())) == 3


def test_a_view_does_not_keep_its_base(tmp_path):
    """A writer that kept views would hold whole layers; it keeps at most one shard."""
    base = torch.arange(40.0).view(10, 4)
    writer = ShardWriter(tmp_path, 10**6)
    for i, row in enumerate(base.unbind()):
        writer.add(str(i), row)
    base.zero_()
    writer.finish()
    assert torch.equal(ShardReader(tmp_path).read("3"), torch.arange(12.0, 16.0))


def test_one_tensor_under_two_names(tmp_path):
    """As the one p of all routers of a model."""
    p = torch.tensor(0.25)
    write(tmp_path, {"a": p, "b": p})
    reader = ShardReader(tmp_path)
    assert reader.read("a") == reader.read("b") == p


def test_a_name_that_comes_twice(tmp_path):
    writer = ShardWriter(tmp_path, 100)
    writer.add("a", torch.zeros(2))
    with pytest.raises(CheckpointError, match="a comes twice"):
        writer.add("a", torch.zeros(2))


def _drop_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def _truncate(folder):
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _index_names_another(folder):
    path = folder / INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))


def _twice(folder):
    path = folder / "model-00001-of-00003.safetensors"
    save_file({**load_file(path), "t5": torch.zeros(1)}, path)


def _no_index(folder):
    (folder / INDEX).unlink()


def _half_an_index(folder):
    (folder / INDEX).write_text('{"weight_map": {"t0"')


def _index_leaves_the_folder(folder):
    (folder / INDEX).write_text('{"weight_map": {"t0": "../elsewhere.safetensors"}}')


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_drop_shard, "model-00002-of-00003.safetensors is missing"),
        (_truncate, "model-00002-of-00003.safetensors is damaged or truncated"),
        (_index_names_another, "ghost"),
        (_twice, "t5 is in both"),
        (_no_index, "has neither"),
        (_half_an_index, "is damaged"),
        (_index_leaves_the_folder, "not a plain file name"),
    ],
)
def test_damage_is_found_and_named(tmp_path, damage, named):
    write(tmp_path, tensors())
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=named):
        ShardReader(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    torch.save(tensors(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin.*only safetensors"):
        ShardReader(tmp_path)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 mib", 500 * 2**20), ("1.5KB", 1500), ("7", 7)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1GB", "0", "5GB5"])
def test_sizes_that_mean_nothing(text):
    with pytest.raises(CheckpointError, match="for example 5GB"):
        parse_size(text)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), new_folder(out) as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_folder(out) as folder:
        (folder / "whole").write_text("")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["whole"]
    with pytest.raises(CheckpointError, match="exists already"), new_folder(out):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
