"""Any state dict in one file under a hard cap, read back by a decoder that needs numpy alone."""

import json
import random
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import reallm
from reallm.checkpoint import unpack as decoder
from reallm.cli import main
from reallm.errors import ArtifactError, RecipeError, SourceError
from reallm.fit import Objective, fit
from reallm.formats import from_spec, to_spec
from reallm.pipeline import pack_file as packing


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", autouse=True)
def tried_once(remembered):
    """Candidates are tried once on a matrix for all files that are packed here: most of the time of packing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "measure_format", remembered(packing.measure_format))
        yield


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    tensors = {
        "embed": noise(300, 64),
        "head": noise(300, 64),  # the same values: tied
        "half": noise(70, 130, seed=1).half(),
        "brain": noise(64, 257, seed=2).bfloat16(),
        "conv": noise(16, 8, 5, 5, seed=3),
        "norm": noise(64, seed=4),
        "count": torch.tensor(7),
        "mask": noise(40, seed=5) > 0,
    }
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    save_file(tensors, path)
    return path, tensors


@pytest.fixture(scope="module")
def code_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "train_gpt.py"
    path.write_text("print('train')\n" * 50)
    return path


@pytest.mark.parametrize("cap", [16_000, 25_000, 36_001])
def test_the_cap_is_kept_and_used_and_everything_comes_back(state, code_file, tmp_path, cap):
    path, tensors = state
    report = reallm.pack(path, tmp_path / "out.bin", cap, [code_file])
    assert 0.99 * cap <= (tmp_path / "out.bin").stat().st_size == report.nbytes <= cap
    found = reallm.unpack(tmp_path / "out.bin")
    assert list(found) != [] and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        wanted = tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        assert found[name].shape == wanted.shape and found[name].dtype == wanted.dtype
        if name in ("norm", "count", "mask"):
            assert np.array_equal(found[name], wanted)
        else:
            assert np.square(found[name] - wanted).sum() < 0.2 * np.square(wanted).sum()
    assert report.tied == {"head": "embed"} and np.array_equal(found["head"], found["embed"])
    assert decoder.files(tmp_path / "out.bin") == {"train_gpt.py": code_file.read_bytes()}


def test_more_bytes_mean_less_error(state, tmp_path):
    errors = [reallm.pack(state[0], tmp_path / str(cap), cap).relative_error for cap in (16_000, 30_000, 60_000)]
    assert errors == sorted(errors, reverse=True) and errors[2] < errors[0] / 20


@pytest.mark.parametrize("fmt", packing.pack_candidates(torch.float32), ids=lambda fmt: str(to_spec(fmt)))
def test_the_small_decoder_agrees_with_the_library_in_every_format(fmt, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "pack_candidates", lambda dtype: [fmt])
    weight = noise(61, 130, seed=8)
    save_file({"w": weight}, tmp_path / "s.safetensors")
    reallm.pack(tmp_path / "s.safetensors", tmp_path / "out", 100_000)
    parts = fit(fmt, weight, Objective.relative_columns(weight))
    shape = (61, 130)
    wanted = fmt.decode(fmt.unpack(fmt.pack(parts, shape), shape), shape)
    np.testing.assert_allclose(reallm.unpack(tmp_path / "out")["w"], wanted.numpy(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", [{"bits": 3, "symmetric": False}, {"bits": 5, "symmetric": False, "group_size": 17}])
def test_the_small_decoder_knows_asymmetric_grids(spec, tmp_path, monkeypatch):
    test_the_small_decoder_agrees_with_the_library_in_every_format(
        from_spec({"format": "uniform", **spec}), tmp_path, monkeypatch
    )


def test_the_decoder_runs_alone_with_numpy_and_nothing_else(state, tmp_path):
    reallm.pack(state[0], tmp_path / "out.bin", 40_000)
    (tmp_path / "alone.py").write_bytes(Path(decoder.__file__).read_bytes())
    block = "import sys; sys.modules.update(torch=None, reallm=None, safetensors=None); sys.argv = ['x', 'out.bin'];"
    run = block + "import runpy; runpy.run_path('alone.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", run], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "brain float32 (64, 257)" in done.stdout


def test_too_small_a_cap_names_the_smallest_possible(state, code_file, tmp_path):
    with pytest.raises(RecipeError, match=r"smallest possible file is ([\d,]+) bytes") as caught:
        reallm.pack(state[0], tmp_path / "out", 2_000, [code_file])
    least = int(str(caught.value).split("file is ")[1].split(" bytes")[0].replace(",", ""))
    assert reallm.pack(state[0], tmp_path / "out", least, [code_file]).nbytes <= least


def test_a_damaged_file_is_refused(state, tmp_path):
    reallm.pack(state[0], tmp_path / "out", 30_000)
    data = bytearray((tmp_path / "out").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "out").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        reallm.unpack(tmp_path / "out")


def forged(path, change, flip=None):
    """The file with another header, or a changed byte behind it, and a checksum that is right for it."""
    data = path.read_bytes()
    size = int.from_bytes(data[4:8], "little")
    header = json.loads(zlib.decompress(data[12 : 12 + size]))
    text, rest = change(json.dumps(header), header), bytearray(data[12 + size :])
    if flip is not None:
        rest[flip % len(rest)] ^= 1 << flip % 8
    packed = zlib.compress((text or json.dumps(header)).encode())
    body = packed + bytes(rest)
    path.write_bytes(data[:4] + len(packed).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little") + body)


@pytest.fixture(scope="module")
def packed(state, code_file, tmp_path_factory):
    """A file of several formats."""
    path = tmp_path_factory.mktemp("packed") / "out.bin"
    reallm.pack(state[0], path, 24_000, [code_file])
    return path


@pytest.mark.parametrize(
    ("what", "change"),
    {
        "a matrix of 10^12 weights": lambda _, h: [
            e.update(matrix=[10**6, 10**6]) for e in h["tensors"] if e["format"]
        ],
        "a negative size": lambda _, h: h["tensors"][0]["stored"][0].__setitem__(3, -1),
        "a shape of 10^15": lambda _, h: h["tensors"][0]["stored"][0].__setitem__(2, [10**15]),
        "a shape of halves": lambda _, h: h["tensors"][0]["stored"][0].__setitem__(2, [0.5]),
        "a dtype of objects": lambda _, h: h["tensors"][0]["stored"][0].__setitem__(1, "O"),
        "deep JSON": lambda text, _: "[" * 100_000,
        "a list": lambda text, _: "[]",
        "no tensors": lambda text, _: "{}",
        "JSON of a gigabyte": lambda text, _: text + " " * 200_000_000,
        "an owner that is not there": lambda _, h: h["same"].update(x="nothing"),
        "files that are not there": lambda _, h: h["files"].append(["x", 10**9]),
    }.items(),
)
def test_a_forged_header_is_one_error_in_little_memory(packed, tmp_path, what, change):
    import tracemalloc

    path = tmp_path / "forged.bin"
    path.write_bytes(packed.read_bytes())

    def changed(text, header):
        found = change(text, header)
        return found if isinstance(found, str) else None

    forged(path, changed)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"damaged or forged"):  # noqa: PT012 - either may be the one that sees it
        reallm.unpack(path)
        decoder.files(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150_000_000, peak  # LZMA takes 67 MB for any file of code


def test_fields_of_a_forged_format_take_no_memory():
    for wrong in (lambda: decoder._codes(np.zeros(4, np.uint8), 10**9, 3), lambda: decoder._levels(10**9)):
        with pytest.raises(ValueError, match="of 1000000000 bits"):
            wrong()
    fmt = {"format": "codebook", "index_bits": 2, "vector_dim": 10**6, "scales": "float16", "group_size": 0}
    stored = {
        "codes": np.zeros(4, np.uint8),
        "codebook": np.zeros((4, 2), np.float16),
        "scales": np.ones(2, np.float16),
    }
    with pytest.raises(ValueError, match="the shape of a codebook differs"):
        decoder._codebook(fmt, stored, 2, 8)


def test_mutants_of_a_packed_file_are_read_or_refused_by_one_error(packed, tmp_path):
    rng, outcomes = random.Random(0), {"read": 0, "refused": 0}
    for _ in range(400):
        path = tmp_path / "mutant.bin"
        path.write_bytes(packed.read_bytes())

        def change(text, _):
            if rng.random() < 0.3:
                return text
            at = rng.randrange(len(text))
            return text[:at] + rng.choice(["0", "9", "-", "1e9", "null", "[]", '"', "", "{}"]) + text[at + 1 :]

        forged(path, change, rng.randrange(1 << 20))
        with np.errstate(all="ignore"):
            try:
                reallm.unpack(path)
                decoder.files(path)
                outcomes["read"] += 1
            except ValueError as problem:
                assert "forged" in str(problem)
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 40, outcomes


def test_mistakes_are_one_line(state, tmp_path):
    save_file({"w": torch.full((64, 64), float("nan"))}, tmp_path / "nan.safetensors")
    with pytest.raises(SourceError, match="w has weights that are NaN"):
        reallm.pack(tmp_path / "nan.safetensors", tmp_path / "out", 10_000)
    with pytest.raises(ValueError, match="is a folder; give the file that reallm pack wrote"):
        reallm.unpack(tmp_path)
    for name in ("model.pt", "MODEL.PT"):
        with pytest.raises(SourceError, match="pickle"):
            reallm.pack(tmp_path / name, tmp_path / "out", 10_000)
    (tmp_path / "there").touch()
    with pytest.raises(ArtifactError, match="exists"):
        reallm.pack(state[0], tmp_path / "there", 10_000)


def test_the_command_prints_error_margin_and_the_size_of_the_decoder(state, code_file, tmp_path, capsys):
    arguments = ["pack", str(state[0]), "-o", str(tmp_path / "out"), "--max-bytes", "30KB", "--with", str(code_file)]
    assert main([*arguments, "--matrices"]) == 0
    text = capsys.readouterr().out
    assert "of 30,000; margin" in text and "relative squared error" in text and "bytes of Python" in text
