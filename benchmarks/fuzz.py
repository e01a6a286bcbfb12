"""Mutated artifacts and plans: each must load, or be refused by one ReallmError, within a time limit.

    python benchmarks/fuzz.py --count 10000

Bits, bytes, headers, JSON and YAML of a tiny artifact of every format are changed by a seeded generator. Every mutant
goes through the ledger and, in either mode and with or without checksums, through loading and one forward pass; every
plan through reading, planning, and fitting each of its formats once. Anything but success or a ReallmError is a
failure, and so is an error that transformers raises only because of us. Writes results/fuzz.json.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import itertools
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

import reallm
from reallm.allocate import MatrixInfo, plan_from_recipe
from reallm.allocate.recipe import parse_recipe
from reallm.checkpoint import read_ledger
from reallm.checkpoint.checksums import compute_checksums
from reallm.errors import ReallmError
from reallm.fit import fit
from reallm.hf import MODES, artifact_memory_footprint, unquantized_tensors, verify_artifact
from reallm.source import open_source, walk

RECIPE = """
name: every format
rules:
- {match: "*.0.*q_proj", format: {format: uniform, bits: 3, group_size: 16}}
- {match: "*.0.*k_proj", format: {format: uniform, bits: 5, group_size: 32, symmetric: true, scales: two_level}}
- {match: "*.0.*v_proj", format: {format: e8, bits: 3}}
- {match: "*.0.*o_proj", format: {format: rotated, base: {format: trellis, bits: 1, state_bits: 6, table_bits: 4}}}
- {match: "*.0.*gate_proj", format: {format: entropy_coded, bits: 4, largest: 7, classes: 2}}
- match: "*.0.*up_proj"
  format: {format: low_rank_plus, rank: 4, factors: int8, base: {format: uniform, bits: 2, group_size: 16}}
- match: "*.0.*down_proj"
  format: {format: permuted, method: sort, base: {format: codebook, index_bits: 5, vector_dim: 2, group_size: 24}}
- {match: "*.1.*q_proj", format: {format: normal_float, bits: 4, group_size: 16}}
- {match: "*.1.*k_proj", format: {format: dense, dtype: float16}}
- match: "*.1.*up_proj"
  format:
    format: gain
    base:
      format: low_rank_plus
      rank: 2
      base: {format: permuted, block_rows: 16, base: {format: normal_float, bits: 3, group_size: 16}}
- {match: "*.1.*down_proj", format: keep}
- {match: "*.1.*v_proj", format: {format: decoupled, base: {format: uniform, bits: 3}}}
- match: "*.1.*o_proj"
  format: {format: decoupled, kind: entries, base: {format: additive, books: 2, index_bits: 3, vector_dim: 4}}
- {match: "*.1.*gate_proj", format: {format: scaled, base: {format: uniform, bits: 4}}}
- {match: "*", format: {format: codebook, index_bits: 4, vector_dim: 1, scales: float16}}
embedding: {format: uniform, bits: 8, group_size: 16, symmetric: true}
"""
# Codes of an even grid on Gaussian weights are worth coding.
CODED = "rules: [{match: '*', format: {format: uniform, bits: 8, group_size: 0, symmetric: true}}]"
NEURAL = """
rules:
- {role: [q, k, v], format: {format: codeword, index_bits: 5, vector_dim: 4, hidden: 3, shared: all}}
- role: o
  format: {format: permuted, base: {format: codeword, index_bits: 5, vector_dim: 4, hidden: 3, shared: all}}
- {role: up, format: {format: conv_latents, width: 2, steps: 2, shared: net, base: {format: uniform, bits: 3}}}
- {role: gate, format: {format: conv_latents, width: 2, channels: 3, steps: 2, base: {format: normal_float, bits: 3}}}
- {match: "*", format: {format: linear_latents, transform: learned, kept: 6, base: {format: uniform, bits: 4}}}
"""
IDS = torch.arange(8).view(2, 4)
SECONDS = 20  # for one mutant; the slowest that is none of our doing took 2 s on a busy core
MEMORY = 3_000_000_000  # bytes of address space beyond those at the start

# Values that readers stumble over.
ODD: list[Any] = [
    *(0, 1, -1, 2, 3, 7, 255, 2**31, 2**63 - 1, 2**64, -(2**63), 10**12, 10**30, 0.5, -0.0, 1e308, 1e-308),
    *(
        float("nan"),
        float("inf"),
        -float("inf"),
        True,
        False,
        None,
        "",
        "x",
        "uniform",
        "../../etc/passwd",
        "/etc/passwd",
    ),
    *("a" * 5000, "\x1b[2J", "\0", "é\ud7ff", [], [[]], {}, {"format": "gain"}, [1, 2, 3], [0] * 1000, {"": {}}),
]


class Expired(BaseException):
    """A mutant took too long. Not an Exception, which transformers and we would turn into another."""


@dataclass
class Outcomes:
    """How many mutants loaded, were refused, and how; and those that did something else."""

    seed: int
    loaded: collections.Counter = field(default_factory=collections.Counter)
    refused: collections.Counter = field(default_factory=collections.Counter)
    kinds: collections.Counter = field(default_factory=collections.Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    slowest: tuple[float, str, int] = (0.0, "", 0)

    def run(self, name: str, number: int, work: Callable[[], None]) -> None:
        """Carry out one mutant's work and judge it."""
        start = time.perf_counter()
        try:
            with _time_limit(SECONDS):
                work()
            self.loaded[name] += 1
        except ReallmError as error:
            self.refused[name] += 1
            self.kinds[type(error).__name__] += 1
            if _is_ours(error.__cause__) or "\n" in str(error) or len(str(error)) > 2000:
                self._fail(name, number, error)
        except (Exception, Expired) as error:
            self._fail(name, number, error)
        self.slowest = max(self.slowest, (round(time.perf_counter() - start, 2), name, number))

    def _fail(self, name: str, number: int, error: BaseException) -> None:
        trace = "".join(traceback.format_exception(error))[-3000:]
        self.failures.append({"mutation": name, "seed": self.seed, "number": number, "trace": trace})


def _is_ours(cause: BaseException | None) -> bool:
    """Whether an exception that became a ReallmError on its way through transformers began in our code."""
    if cause is None or isinstance(cause, ReallmError | OSError):
        return False
    frames = [f.filename for f in traceback.extract_tb(cause.__traceback__)]
    rooms = [name for name in frames if "/reallm/" in name or "/transformers/" in name]
    inside = len([name for name in rooms if "/transformers/" in name]) > 0
    return isinstance(cause, MemoryError) or (inside and "/reallm/" in rooms[-1] and "untrusted" not in rooms[-1])


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def expired(*_: Any) -> None:
        raise Expired(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def memory_limit(nbytes: int) -> Iterator[None]:
    """No more address space than now and so much: what wants more gets a MemoryError in place of the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def make_model(folder: Path) -> Path:
    """A tiny random Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_artifacts(place: Path) -> list[Path]:
    """One artifact in one file, the same in shards, one with entropy-coded tensors, and one with neural decoders."""
    from safetensors.torch import load_file

    from reallm.checkpoint import write_shards

    (place / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    whole = place / "whole"
    reallm.compress(make_model(place / "model"), whole, recipe=str(place / "recipe.yaml"))
    sharded = Path(shutil.copytree(whole, place / "sharded"))
    (sharded / "model.safetensors").unlink()
    write_shards(load_file(whole / "model.safetensors").items(), sharded, max_bytes=12_000)
    _seal(sharded)
    (place / "coded.yaml").write_text(CODED, encoding="utf-8")
    reallm.compress(place / "model", place / "coded", recipe=str(place / "coded.yaml"), coding=True)
    (place / "neural.yaml").write_text(NEURAL, encoding="utf-8")
    reallm.compress(place / "model", place / "neural", recipe=str(place / "neural.yaml"))
    return [whole, sharded, place / "coded", place / "neural"]


def _seal(folder: Path) -> None:
    """Write the checksums of the tensors as they are now: what a hostile author would do too."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["checksums"] = compute_checksums(folder.glob("*.safetensors"))
    file.write_text(json.dumps(config))


# Mutations: each changes files of a folder in place, with numbers drawn from `rng`.


def flip_bits(folder: Path, rng: random.Random) -> None:
    """Some bits of any file."""
    file = _any_file(folder, rng, "*")
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def cut_or_grow(folder: Path, rng: random.Random) -> None:
    """A file that ends early, has more at its end, lost or doubled a part, or is empty."""
    file = _any_file(folder, rng, "*")
    data = file.read_bytes()
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    file.write_bytes(
        rng.choice(
            [data[:a], data + data[a:b], data[:a] + data[b:], data[:b] + data[a:], data[:a] + bytes(b - a) + data[b:]]
        )
    )


def flip_header(folder: Path, rng: random.Random) -> None:
    """Bytes of the length or the header of a safetensors file."""
    file = _any_file(folder, rng, "*.safetensors")
    data = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice([1, 1, 2, 4])):
        data[rng.choice([rng.randrange(8), rng.randrange(end)])] = rng.randrange(256)
    file.write_bytes(data)


def lie_in_header(folder: Path, rng: random.Random) -> None:
    """A header that parses, and says something else."""
    file = _any_file(folder, rng, "*.safetensors")
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = mutated(json.loads(data[8:end]), rng)
    text = json.dumps(header).encode(errors="replace")
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def change_config(folder: Path, rng: random.Random) -> None:
    """Values of config.json: those of the original model, or of how it is stored."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    if rng.random() < 0.6:
        config["quantization_config"] = mutated(config["quantization_config"], rng)
    else:
        config = mutated(config, rng)
    file.write_text(json.dumps(config), errors="replace")


def change_layout(folder: Path, rng: random.Random) -> None:
    """Fields of the formats."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    layouts = config["quantization_config"]["layouts"]
    place = rng.randrange(len(layouts))
    layouts[place] = mutated(layouts[place], rng)
    file.write_text(json.dumps(config), errors="replace")


def change_index(folder: Path, rng: random.Random) -> None:
    """The index of shards."""
    files = list(folder.glob("*.index.json"))
    if not files:
        return change_config(folder, rng)
    files[0].write_text(json.dumps(mutated(json.loads(files[0].read_text()), rng)), errors="replace")


def change_values(folder: Path, rng: random.Random) -> None:
    """Stored numbers, with checksums that agree: NaN, infinities, noise, orders that are none."""
    file = _any_file(folder, rng, "*.safetensors")
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    names = [name for name, entry in header.items() if name != "__metadata__" and len(set(entry["data_offsets"])) > 1]
    name = rng.choice(names)
    a, b = (start + offset for offset in header[name]["data_offsets"])
    noise = {
        "noise": lambda n: rng.randbytes(n),
        "ones": lambda n: b"\xff" * n,
        "zeros": bytes,
        "infinity": lambda n: (b"\x00\x7c" if header[name]["dtype"] == "F16" else b"\x80\x7f") * (n // 2 + 1),
    }
    part = rng.choice([b - a, min(4, b - a), min(2, b - a)])
    at = a + rng.randrange((b - a - part) // 2 + 1) * 2
    data[at : at + part] = rng.choice(list(noise.values()))(part)[:part]
    file.write_bytes(data)
    _seal(folder)


def change_folder(folder: Path, rng: random.Random) -> None:
    """Files that are missing, swapped, links or folders."""
    file = _any_file(folder, rng, "*")
    kind = rng.randrange(5)
    if kind == 0:
        file.unlink()
    elif kind == 1:
        other = _any_file(folder, rng, "*")
        first, second = file.read_bytes(), other.read_bytes()
        file.write_bytes(second)
        other.write_bytes(first)
    elif kind == 2:
        file.unlink()
        file.symlink_to(rng.choice(["/etc/passwd", "/dev/zero", "../whole/config.json", file.name, "nowhere", "/"]))
    elif kind == 3:
        file.unlink()
        file.mkdir()
    else:
        (folder / "more.safetensors").write_bytes(file.read_bytes())


def change_json_text(folder: Path, rng: random.Random) -> None:
    """JSON that is deep, long, doubled or of another encoding."""
    file = _any_file(folder, rng, "*.json")
    text = file.read_text()
    depth = rng.choice([40, 900, 3000, 200_000])
    file.write_bytes(
        rng.choice(
            [
                lambda: text.replace(":", ': {"a":' * depth, 1).encode(),
                lambda: ("[" * depth + "]" * depth).encode(),
                lambda: text.replace("{", '{"a": ' + "[" * depth + "]" * depth + ",", 1).encode(),
                lambda: text.replace("{", "{" + text.strip()[1:-1] + ",", 1).encode(),
                lambda: text.encode("utf-16"),
                lambda: text.replace("1", "1" * 5000, 1).encode(),
                lambda: text.replace("{", '{"a": [' + "[]," * depth + "0],", 1).encode(),
            ]
        )()
    )


MUTATIONS: list[Callable[[Path, random.Random], None]] = [
    flip_bits,
    cut_or_grow,
    flip_header,
    lie_in_header,
    change_config,
    change_layout,
    change_index,
    change_values,
    change_folder,
    change_json_text,
]


def _any_file(folder: Path, rng: random.Random, pattern: str) -> Path:
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    heavy = [path for path in files if path.suffix in (".safetensors", ".json")]
    return rng.choice(heavy or files)


def mutated(values: Any, rng: random.Random) -> Any:
    """A copy of plain values with one to three places changed."""
    values = copy.deepcopy(values)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        holders = [holder for holder in _holders(values) if len(holder)]
        if not holders:
            break
        holder = rng.choice(holders)
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        _change(holder, key, rng)
    return values


def _change(holder: Any, key: Any, rng: random.Random) -> None:
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(["x", "format", "base", "bits", "", "a.b", "../x", "__metadata__"])] = copy.deepcopy(
            holder[key]
        )
    elif kind == 2 and isinstance(holder[key], int):
        holder[key] += rng.choice([-1, 1, 2, -holder[key] * 2, holder[key], 1 << 40])
    elif kind == 3:
        values = list(holder.values()) if isinstance(holder, dict) else holder
        holder[key] = copy.deepcopy(rng.choice(values))
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))


def _holders(values: Any) -> list[Any]:
    found, level = [], [values]
    while level:
        level = [value for value in level if isinstance(value, dict | list)]
        found += level
        level = [value for holder in level for value in (holder.values() if isinstance(holder, dict) else holder)]
    return found


def mutated_plan(text: str, rng: random.Random) -> str:
    """YAML with values, characters or lines changed, or aliases that grow."""
    kind = rng.randrange(5)
    if kind < 2:
        return yaml.safe_dump(mutated(yaml.safe_load(text), rng), sort_keys=False)
    if kind == 2:
        letters = list(text)
        for _ in range(rng.choice([1, 2, 5, 20])):
            letters[rng.randrange(len(letters))] = rng.choice("{}[]:,&*!|>-#%@\"' \n\t0aé\0\x85\ufeff<=~")
        return "".join(letters)
    if kind == 3:
        lines = text.splitlines()
        for _ in range(rng.choice([1, 3])):
            a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
            lines[a] = rng.choice([lines[b], "  " + lines[a], lines[a].strip(), lines[a] + lines[b], ""])
        return "\n".join(lines)
    words = rng.choice(
        [
            "a: &a [x, x]\n"
            + "".join(f"{c}: &{c} [*{p}, *{p}, *{p}, *{p}]\n" for p, c in itertools.pairwise("abcdefghijklm")),
            "rules: &a [*a]\n",
            "rules: &a {format: *a}\n",
            "rules: " + "[" * rng.choice([30, 500, 5000]),
            "rules: !!python/object/apply:os.system ['echo pwned']\n",
            "rules: [{match: '*', format: {format: !!timestamp foo}}]\n",
            "rules: [{match: '*', format: {format: uniform, bits: !!int ''}}]\n",
            "rules: [{match: '*', format: {format: uniform, bits: 2001-99-99}}]\n",
            "rules: [{match: '*', format: {format: uniform, bits: " + "9" * 5000 + "}}]\n",
            "rules: [{match: '" + "*a" * 3000 + "', format: keep}]\n",
            "<<: 3\nrules: []\n",
            "? [a]\n: b\n",
        ]
    )
    return rng.choice([words, words + text, text + words])


def read_plan(text: str, matrices: list[MatrixInfo]) -> None:
    """Read, plan, and fit every distinct format once."""
    plan = plan_from_recipe(parse_recipe(text, "mutant"), matrices)
    generator = torch.Generator().manual_seed(0)
    for fmt, shape in {(entry.fmt, entry.matrix.shape) for entry in plan.entries}:
        assert len(fmt.layout(shape)) > 0
        fmt.pack(fit(fmt, torch.randn(shape, generator=generator)), shape)


def open_artifact(folder: Path, mode: str, verify: bool) -> None:
    """What `reallm info` does, then load and compute."""
    read_ledger(folder)
    if verify:
        verify_artifact(folder)
    artifact_memory_footprint(folder)
    unquantized_tensors(folder)
    with torch.no_grad():
        reallm.load(folder, mode, verify=verify)(IDS)


def fuzz(count: int, seed: int, plans: float = 0.4) -> Outcomes:
    """Run `count` mutants, a share of `plans` of them plans."""
    outcomes = Outcomes(seed)
    with tempfile.TemporaryDirectory() as place:
        artifacts = make_artifacts(Path(place))
        text = (artifacts[0] / "plan.yaml").read_text(encoding="utf-8")
        found = walk(open_source(Path(place) / "model").skeleton).matrices
        infos = [MatrixInfo(m.name, m.shape, m.role, m.kind, m.block) for m in found]
        for number in range(count):
            rng = random.Random(f"{seed} {number}")
            if rng.random() < plans:
                plan = mutated_plan(rng.choice([text, RECIPE]), rng)
                outcomes.run("plan", number, lambda plan=plan: read_plan(plan, infos))
            else:
                _artifact(outcomes, number, rng, artifacts, Path(place) / "mutant")
    return outcomes


def _artifact(outcomes: Outcomes, number: int, rng: random.Random, artifacts: list[Path], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(rng.choice(artifacts), folder)
    mutation = rng.choice(MUTATIONS)
    mutation(folder, rng)
    mode, verify = rng.choice(MODES), rng.random() < 0.5
    outcomes.run(mutation.__name__, number, lambda: open_artifact(folder, mode, verify))


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/fuzz.json"))
    options = parser.parse_args()
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz(1, options.seed)  # imports take memory too
    with memory_limit(MEMORY):
        outcomes = fuzz(options.count, options.seed)
    from lab import commit, machine

    result = {
        "command": f"python benchmarks/fuzz.py --count {options.count} --seed {options.seed}",
        "mutants": options.count,
        "loaded": dict(sorted(outcomes.loaded.items())),
        "refused": dict(sorted(outcomes.refused.items())),
        "refused_by": dict(outcomes.kinds),
        "failures": outcomes.failures,
        "slowest": outcomes.slowest,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_growth_bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
        "commit": commit(),
        "machine": machine(torch.device("cpu")),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "failures"}, indent=1))
    for failure in outcomes.failures[:10]:
        print(failure["mutation"], failure["number"], failure["trace"], sep="\n", file=sys.stderr)
    sys.exit(bool(outcomes.failures))


if __name__ == "__main__":
    main()
