"""Forged headers, huge JSON, links out of the folder: one ArtifactError each, before anything is allocated."""

import json
import os

import pytest

from reallm.checkpoint import read_manifest
from reallm.checkpoint.validation import check_inside, check_shard_name, read_header, read_json
from reallm.errors import ArtifactError, SourceError


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(start, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def test_a_valid_header_is_read_with_its_offsets(tmp_path):
    file = write(
        tmp_path / "x", {"__metadata__": {"format": "pt"}, "b": tensor(4, 6), "a": tensor(0, 4, [1], "F32")}, b"abcdef"
    )
    entries, size = read_header(file)
    assert (entries["a"].dtype, entries["a"].shape, entries["a"].nbytes, entries["b"].nbytes) == ("F32", (1,), 4, 2)
    assert (entries["a"].start, entries["b"].end) == (size, file.stat().st_size)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"a": tensor(0, 8, [10**12, 10**12], "F32")}, "has 8 bytes"),
        ({"a": tensor(0, 8, [2**62, 2**62, 0, 8])}, "has 8 bytes"),
        ({"a": tensor(0, 8, [2**63])}, "has shape"),
        ({"a": tensor(0, 8, [-8])}, "has shape"),
        ({"a": tensor(0, 8, [8.0])}, "has shape"),
        ({"a": tensor(0, 8, [True] * 8)}, "has shape"),
        ({"a": tensor(0, 8, [1] * 20)}, "has shape"),
        ({"a": tensor(0, 8, "8")}, "has shape"),
        ({"a": tensor(0, 8, dtype="F12")}, "dtype 'F12', not one of"),
        ({"a": tensor(0, 8, dtype=["U8"])}, "dtype"),
        ({"a": tensor(0, 8), "b": tensor(0, 8)}, "overlap or leave a gap"),
        ({"a": tensor(0, 5), "b": tensor(4, 8)}, "overlap or leave a gap at byte 5"),
        ({"a": tensor(0, 3), "b": tensor(4, 8)}, "overlap or leave a gap at byte 3"),
        ({"a": tensor(0, 7)}, "1 bytes belong to no tensor"),
        ({"a": tensor(0, 9)}, "1 bytes are missing"),
        ({"a": tensor(0, 2**63 - 1)}, "bytes are missing"),
        ({"a": {**tensor(0, 8), "more": 1}}, "lacks dtype"),
        ({"a": 3}, "lacks dtype"),
        ({"a\n\x1b[2J": tensor(0, 8)}, "is not a name"),
        ({"": tensor(0, 8)}, "is not a name"),
        ({"__metadata__": {"format": 3}, "a": tensor(0, 8)}, "metadata"),
        (b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}', "occurs twice"),
        (b'{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 8]}}', "NaN in a header"),
        (b'{"a": [' + b"[]," * 100_000 + b"[]]}", "a header of brackets"),
        (b'{"a": ' + b"1" * 5000 + b"}", "4300 digits"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, says):
    file = write(tmp_path / "x.safetensors", header, b"12345678")
    for kind in (ArtifactError, SourceError):
        with pytest.raises(kind, match=f"x.safetensors: damaged .*{says}") as caught:
            read_header(file, kind)
        assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


def test_a_header_longer_than_any_model_needs_is_never_read(tmp_path):
    file = write(tmp_path / "x.safetensors", b"{}", length=33_000_000)
    os.truncate(file, 40_000_000)
    with pytest.raises(ArtifactError, match="a header of 33,000,000 bytes, more than"):
        read_header(file)


def test_json_that_is_huge_deep_or_doubled_is_refused(tmp_path):
    file = tmp_path / "x.json"
    for text, says in [
        ("[" * 34 + "]" * 34, "nested more than 32"),
        ("[" * 100_000 + "]" * 100_000, "recursion"),
        ('{"a": 1, "a": 2}', "occurs twice"),
        ("1" * 5000, "4300 digits"),
    ]:
        file.write_text(text)
        with pytest.raises(ArtifactError, match=f"x.json: is not JSON that can be parsed .*{says}"):
            read_json(file)
    os.truncate(file, 33_000_000)
    with pytest.raises(ArtifactError, match="33,000,000 bytes of JSON"):
        read_json(file)


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    for reader in (read_json, read_header):
        with pytest.raises(ArtifactError, match="is not a regular file"):
            reader(tmp_path / "config.json")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(ArtifactError, match="is not a regular file"):
        read_json(tmp_path / "zero")


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/x.safetensors",
        "x.bin",
        "",
        None,
        3,
        "a\\x.safetensors",
        "\n.safetensors",
    ],
)
def test_an_index_names_safetensors_files_of_its_own_folder(name):
    with pytest.raises(ValueError, match="is not a"):
        check_shard_name(name)


def test_links_may_lead_nowhere_but_into_the_folder_or_the_hubs_cache(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    (blobs / "123").write_text("{}"), (tmp_path / "secret").write_text("{}"), (snapshot / "real").write_text("{}")
    for name, target in {"blob": "../../blobs/123", "inside": "real"}.items():
        (snapshot / name).symlink_to(target)
        check_inside(snapshot / name, snapshot)
    for name, target in {
        "out": "../../secret",
        "far": "/etc/passwd",
        "sneaky": "../../blobs/../secret",
        "loop": "loop",
    }.items():
        (snapshot / name).symlink_to(target)
        with pytest.raises(ArtifactError, match="is a link"):
            check_inside(snapshot / name, snapshot)
        (snapshot / name).unlink()


def test_an_artifact_with_a_link_out_of_it_is_refused_whatever_the_file(tmp_path):
    (tmp_path / "secret").write_text("{}")
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "reallm", "version": 1}}')
    (folder / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(ArtifactError, match="tokenizer.json: is a link to .*secret, outside the folder"):
        read_manifest(folder)
