"""Whatever lies in a checkpoint's folder: readers give what was saved, or an error that says what is wrong. No stack
trace of a library, and nothing partial that looks whole."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsmoe.checkpoint import files
from dsmoe.checkpoint.load import CheckpointReader
from dsmoe.checkpoint.verify import verify_checkpoint
from dsmoe.checkpoint.write import write_weights
from dsmoe.config import validate_config
from dsmoe.errors import CheckpointError
from dsmoe.model.skeleton import logical_shapes
from dsmoe.routers.registry import option_classes
from dsmoe.training.resume import resume

MODEL = dict(num_layers=1, hidden_size=8, num_attention_heads=2, sequence_length=8, vocab_size=16, num_experts=2,
             moe_ffn_hidden_size=8)  # fmt: skip
DATA = {"train": {"fingerprint": "", "tokens": 100}, "valid": {"fingerprint": "", "tokens": 10}, "tokenizer": None}
EXAMPLES = int(os.environ.get("DSMOE_FUZZ", "40"))
FUZZ = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A whole checkpoint of weights in two files, and its tensors."""
    config = validate_config({"model": MODEL, "router": {"name": "relu", "k": 1.0}}, option_classes())
    shapes = dict(logical_shapes(config.model, config.router))
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    run_dir = tmp_path_factory.mktemp("run")
    state = {"lambda": torch.tensor(0.5)}
    folder = write_weights(run_dir, config, shapes, tensors.items(), state, file_size=2000)
    assert verify_checkpoint(folder).problems == []
    return folder, {name: tensor.flatten() for name, tensor in tensors.items()}


def read_everything(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """All that reads a checkpoint; what it gives is what was saved."""
    verified = verify_checkpoint(folder)
    try:
        files.find_checkpoint("auto", folder.parent.parent)
        files.find_checkpoint(str(folder), folder.parent.parent)
        reader = CheckpointReader(folder)
        resume(reader.manifest, validate_config({"model": MODEL}, option_classes()), DATA)
    except CheckpointError:
        pass
    try:
        reader = CheckpointReader(folder)
        values = {name: reader.read("weight", name, 0, tensor.numel()) for name, tensor in tensors.items()}
        reader.controller_state(), reader.idle_steps(), reader.random_state(0)
    except CheckpointError as error:
        assert str(error)
        return
    if not verified.problems:
        assert all(torch.equal(values[name], tensor) for name, tensor in tensors.items())


def paths_of(tree, prefix=()) -> list[tuple]:
    """Where each value of a JSON tree is."""
    actual = [prefix] if prefix else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        actual += paths_of(value, (*prefix, key))
    return actual


@given(data=st.data())
@FUZZ
def test_a_manifest_with_anything_anywhere(checkpoint, data):
    """Its sha256 is right, so that what it says is looked at."""
    folder, tensors = checkpoint
    path = folder / files.MANIFEST
    saved = path.read_bytes()
    content = json.loads(saved)
    content.pop("sha256")
    for _ in range(data.draw(st.integers(1, 2))):
        where = data.draw(st.sampled_from(paths_of(content)))
        parent = content
        for key in where[:-1]:
            parent = parent[key]
        if data.draw(st.booleans()) and isinstance(parent, dict):
            value = parent.pop(where[-1])
            if data.draw(st.booleans()):
                parent[data.draw(st.text(max_size=8))] = value
        else:
            parent[where[-1]] = data.draw(values)
    try:
        text = json.dumps(content, sort_keys=True)
        content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        path.write_text(json.dumps(content))
        read_everything(folder, tensors)
    finally:
        path.write_bytes(saved)


@given(content=st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()))
@FUZZ
def test_a_manifest_that_is_something_else(checkpoint, content):
    folder, tensors = checkpoint
    path = folder / files.MANIFEST
    saved = path.read_bytes()
    try:
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            files.read_manifest(folder)
        read_everything(folder, tensors)
    finally:
        path.write_bytes(saved)


@given(data=st.data())
@FUZZ
def test_tensor_files_with_bytes_changed(checkpoint, data):
    """Their checksums in the manifest are right, so that what is in them is looked at."""
    folder, tensors = checkpoint
    manifest = files.read_manifest(folder)
    name = data.draw(st.sampled_from(sorted(manifest.files)))
    path, manifest_bytes = folder / name, (folder / files.MANIFEST).read_bytes()
    saved = path.read_bytes()
    changed = bytearray(saved)
    for _ in range(data.draw(st.integers(1, 4))):
        # The header comes first: its length in 8 bytes, then JSON.
        at = data.draw(st.integers(0, 300) | st.integers(0, len(saved) - 1))
        changed[min(at, len(saved) - 1)] = data.draw(st.integers(0, 255))
    changed = changed[: data.draw(st.integers(0, len(changed)) | st.just(len(changed)))]
    try:
        path.write_bytes(bytes(changed))
        forged = copy.deepcopy(manifest)
        forged.files[name] = files.checksum(path)
        forged.write(folder)
        verified = verify_checkpoint(folder)
        read_everything(folder, {} if not verified.problems else tensors)  # other numbers are a checkpoint too
    finally:
        path.write_bytes(saved)
        (folder / files.MANIFEST).write_bytes(manifest_bytes)


@given(text=st.binary(max_size=60))
@FUZZ
def test_a_pointer_that_is_anything(checkpoint, text):
    folder, _ = checkpoint
    pointer = folder.parent / "latest"
    saved = pointer.read_bytes()
    try:
        pointer.write_bytes(text)
        assert files.find_checkpoint("auto", folder.parent.parent) == folder
    finally:
        pointer.write_bytes(saved)
