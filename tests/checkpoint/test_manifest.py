import json

import pytest

from reallm.checkpoint import Manifest, StoredMatrix, read_manifest
from reallm.checkpoint.validation import read_header
from reallm.errors import ArtifactError, FormatError
from reallm.formats import from_spec

FMT = from_spec({"format": "low_rank_plus", "rank": 2, "base": {"format": "codebook", "index_bits": 4}})
OTHER = from_spec({"format": "uniform", "bits": 8})
MANIFEST = Manifest(
    (
        StoredMatrix("embed", OTHER, (50, 8), "embedding"),
        StoredMatrix("a.q", FMT, (8, 8), "block"),
        StoredMatrix("b.q", FMT, (8, 8), "block"),
        StoredMatrix("b.up", FMT, (16, 8), "block"),
    ),
    {"seed": 3},
)


def as_json(manifest):
    return json.loads(json.dumps(manifest.to_dict()))


def test_rewriting_a_manifest_read_from_sorted_json_gives_the_same_bytes():
    text = json.dumps(MANIFEST.to_dict(), sort_keys=True)
    assert json.dumps(Manifest.from_dict(json.loads(text)).to_dict(), sort_keys=True) == text


def test_a_manifest_survives_json():
    assert Manifest.from_dict(as_json(MANIFEST)) == MANIFEST


def test_matrices_with_equal_layouts_share_one_entry():
    assert len(MANIFEST.to_dict()["layouts"]) == 3


def test_keys_of_later_versions_are_ignored():
    assert Manifest.from_dict(as_json(MANIFEST) | {"flavour": "new", "quant_method": "reallm"}) == MANIFEST


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda v: v.update(version=3), ArtifactError, "newer reallm"),
        (lambda v: v.update(version=True), ArtifactError, "True is not a version"),
        (lambda v: v.update(version="1"), ArtifactError, "'1' is not a version"),
        (lambda v: v.update(version=0), ArtifactError, "0 is not a version"),
        (lambda v: v.pop("version"), ArtifactError, "None is not a version"),
        (lambda v: v.pop("layouts"), ArtifactError, "damaged"),
        (lambda v: v.pop("matrices"), ArtifactError, "damaged"),
        (lambda v: v.update(matrices=[1]), ArtifactError, "damaged"),
        (lambda v: v.update(layouts=None), ArtifactError, "damaged"),
        (lambda v: v.update(layouts=[3]), ArtifactError, "damaged"),
        (lambda v: v["layouts"][0].pop("kind"), ArtifactError, "damaged"),
        (lambda v: v["layouts"][0].update(kind="tail"), ArtifactError, "kind='tail'"),
        (lambda v: v["layouts"][0].update(shape=[3]), ArtifactError, "shape=\\[3\\]"),
        (lambda v: v["layouts"][0].update(shape=[3, -1]), ArtifactError, "is not a stored matrix"),
        (lambda v: v["layouts"][0].update(shape="3x3"), ArtifactError, "is not a stored matrix"),
        (lambda v: v["layouts"][1].update(shape=[1, 8]), FormatError, "rank=2 exceeds"),
        (lambda v: v["layouts"][0].update(format=None), FormatError, "a format is a mapping"),
        (lambda v: v["layouts"][0]["format"].update(format="zip"), FormatError, "unknown format 'zip'; known formats"),
        (lambda v: v["layouts"][2]["format"].update(bits=9), FormatError, "bits=9"),
        (lambda v: v["matrices"].update(embed=9), ArtifactError, "embed has layout 9 of 3"),
        (lambda v: v["matrices"].update(embed=-1), ArtifactError, "embed has layout -1"),
        (lambda v: v["matrices"].update(embed="0"), ArtifactError, "embed has layout '0'"),
    ],
)
def test_a_damaged_manifest_is_refused_with_the_reason(change, error, says):
    values = as_json(MANIFEST)
    change(values)
    with pytest.raises(error, match=says):
        Manifest.from_dict(values)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no config.json"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "not compressed by reallm"),
        (b"{}", "not compressed by reallm"),
        (b'{"quantization_config": 3}', "not compressed by reallm"),
        (b'{"quantization_config": {"quant_method": "gptq"}}', "not compressed by reallm"),
    ],
)
def test_a_folder_that_is_not_an_artifact_is_refused_with_the_reason(tmp_path, content, says):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=says):
        read_manifest(tmp_path)


def test_a_missing_folder_and_a_file_have_different_errors(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="no such folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="is a file; give the folder"):
        read_manifest(tmp_path / "file")


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        header(b"{}", 10**15),
        header(b"{}", 2**64 - 1),
        header(b"{"),
        header(b"[]"),
        header(b"3"),
        header(b"\xff\xfe"),
        header(b"[" * 100_000),
        header(b'{"a": 3}'),
        header(b'{"a": {"shape": [1]}}'),
        header(b'{"a": {"shape": [1], "data_offsets": [0]}}'),
        header(b'{"a": {"shape": [1], "data_offsets": [4, 0]}}'),
        header(b'{"a": {"shape": [1], "data_offsets": [0, 99999]}}'),
        header(b'{"a": {"shape": [1], "data_offsets": ["0", "4"]}}'),
        header(b'{"a": {"shape": 1, "data_offsets": [0, 4]}}'),
    ],
)
def test_a_damaged_header_is_one_error_that_names_the_file(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match="x.safetensors: ") as caught:
        read_header(tmp_path / "x.safetensors")
    assert len(str(caught.value)) < 500
