import json

import pytest
import torch
from safetensors.torch import load_file

from reallm.checkpoint import save_tensors, write_shards


def tensors(count=5, size=100):
    return [(f"t{i}", torch.full((size,), i, dtype=torch.float32)) for i in range(count)]


def loaded(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_tensors_within_the_limit_are_one_file_without_an_index(tmp_path):
    write_shards(tensors(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("max_bytes", [1, 399, 400, 401, 800, 1999])
def test_shards_hold_all_tensors_within_the_limit_unless_one_tensor_exceeds_it(tmp_path, max_bytes):
    write_shards(tensors(), tmp_path, max_bytes)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 400
    assert all(torch.equal(loaded(tmp_path)[name], tensor) for name, tensor in tensors())
    for file in tmp_path.glob("*.safetensors"):
        held = load_file(file)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= max_bytes
        assert all(index["weight_map"][name] == file.name for name in held)


def test_shards_are_named_as_the_hugging_face_libraries_expect(tmp_path):
    write_shards(tensors(3), tmp_path, 400)
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]


def test_tensors_are_taken_one_by_one_and_at_most_a_shard_is_held(tmp_path):
    alive = []

    def counting():
        for name, tensor in tensors(10):
            alive.append(len(list(tmp_path.glob("*.safetensors"))))
            yield name, tensor

    write_shards(counting(), tmp_path, 800)
    assert alive == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_no_tensors_make_an_empty_file(tmp_path):
    write_shards([], tmp_path)
    assert load_file(tmp_path / "model.safetensors") == {}


def test_a_file_is_complete_or_absent(tmp_path, monkeypatch):
    def broken(*_, **__):
        (tmp_path / "x.safetensors.partial").write_bytes(b"half")
        raise OSError

    monkeypatch.setattr("reallm.checkpoint.writer.save_file", broken)
    with pytest.raises(OSError):
        save_tensors({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_views_and_transposed_tensors_are_written_contiguously(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    save_tensors({"rows": base[1:], "turned": base.T}, tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["rows"], base[1:]) and torch.equal(found["turned"], base.T)
