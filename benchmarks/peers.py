"""Other packages' quantisers, each by its own release, on the same model, text and protocol as ours.

    python benchmarks/peers.py --model MODEL --data-dir DATA --peers hqq gptqmodel auto-round
    python benchmarks/peers.py --model MODEL.gguf --data-dir DATA --peers llama.cpp --llama BIN --imatrix FILE --resume

A peer compresses the block matrices in a process of its own, with the settings that its package has by default, but
for bits and group size. What is scored is what the peer itself decodes from its packed tensors, put into our model:
WikiText-2 raw test, all windows, float32. Bits are those of the tensors that the peer stores for the block matrices,
side tensors included; what it says of them in JSON is not in it, as it is not in ours. Embedding and head stay as
they are. Peers that want text get ours: c4/c4-train-sample.jsonl, 128 windows of 2,048 tokens.
Writes results/peers.json after every arm; a peer that is missing or fails is named there with the reason.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from data_free import finished
from lab import Arm, Lab, arguments, earlier_runs, original_of, save
from safetensors.torch import load_file, save_file

from reallm.calibrate.windows import windows_from_files
from reallm.hf import load_tokenizer
from reallm.source import open_source

Setting = dict[str, Any]

ITERS = {"iters": 200}  # AutoRound's own, written down

# (peer, name, setting). Groups of 64: SmolLM2's width of 576 is no multiple of 128.
ARMS: list[tuple[str, str, Setting]] = [
    *(("hqq", f"HQQ {bits} bit g64", {"nbits": bits, "group_size": 64, "axis": 1}) for bits in (4, 3, 2)),
    *(("hqq", f"HQQ {bits} bit g64 axis 0", {"nbits": bits, "group_size": 64, "axis": 0}) for bits in (4, 3, 2)),
    *(("gptqmodel", f"GPTQModel {bits} bit g64", {"bits": bits, "group_size": 64}) for bits in (3, 2, 4)),
    *(("auto-round", f"AutoRound {bits} bit g64", {"bits": bits, "group_size": 64, **ITERS}) for bits in (3, 2, 4)),
    *(("llama.cpp", f"llama.cpp {kind}", {"type": kind}) for kind in ("IQ2_S", "IQ3_S", "Q2_0")),
]
PEERS = tuple(dict.fromkeys(peer for peer, _, _ in ARMS))


@dataclass(frozen=True)
class Job:
    """What a peer is given."""

    setting: Setting
    names: tuple[str, ...]  # modules to compress
    dense: Path  # the model as transformers saves it, float32
    model: str  # the model as it was named
    windows: Path  # safetensors: `ids`, the calibration text
    device: str
    work: Path  # an empty folder, which goes when the arm is scored
    llama: Path | None = None  # folder of llama-quantize
    llama_version: str = "unknown"
    imatrix: Path | None = None


@dataclass(frozen=True)
class Packed:
    """What a peer made of the block matrices."""

    weights: dict[str, torch.Tensor]  # module name -> (out, in), as the peer decodes it
    stored: dict[str, int]  # kind of tensor -> bytes
    version: str
    note: Setting  # what the arm's row says besides


def hqq(job: Job) -> Packed:
    """Half-Quadratic Quantization: no data. The state's tensors are codes, scales and zeros (float16)."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    HQQLinear.set_backend(HQQBackend.PYTORCH)
    model = dense_model(job)
    weights, stored = {}, Counter()
    for name in job.names:
        layer = HQQLinear(model.get_submodule(name), BaseQuantizeConfig(**job.setting), device=job.device)
        kept = {"W_q": layer.W_q, **{k: v for k, v in layer.meta.items() if isinstance(v, torch.Tensor)}}
        stored.update({kind: tensor.nbytes for kind, tensor in kept.items()})
        weights[name] = layer.dequantize()
    return Packed(weights, dict(stored), importlib.metadata.version("hqq"), {})


def gptqmodel(job: Job) -> Packed:
    """GPTQ. Bytes are those of the checkpoint it saves: codes, scales, zeros and the group of every column."""
    if (os.cpu_count() or 1) < 3:  # it plans half the cores as workers and then wants two
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(**job.setting, offload_to_disk=False, pack_impl="original")  # no compiler needed
    model = GPTQModel.load(str(job.dense), config, device=job.device)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in windows_of(job)]
    model.quantize(rows, batch_size=8, backend=BACKEND.GPTQ_TORCH)
    model.save(str(job.work / "saved"))
    # Only on loading it takes the zeros as the file has them, one less than they are.
    read = GPTQModel.load(str(job.work / "saved"), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16)
    weights = {name: read.model.get_submodule(name).dequantize_weight().T for name in job.names}
    note = {"sym": config.sym, "desc_act": config.desc_act, "damp_percent": config.damp_percent}
    return Packed(weights, stored_bytes(job.work / "saved", job.names), importlib.metadata.version("gptqmodel"), note)


def auto_round(job: Job) -> Packed:
    """AutoRound: rounding learnt by signed gradients. Scored as its own torch kernel decodes the saved file."""
    without_datasets()
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    rows = windows_of(job)
    text = {"nsamples": len(rows), "seqlen": rows.shape[1], "dataset": [row[None] for row in rows]}
    tokenizer = load_tokenizer(str(job.dense))
    rounder = AutoRound(dense_model(job), tokenizer, scheme="W4A16", **job.setting, **text, device_map=job.device)
    rounder.quantize_and_save(str(job.work / "saved"), format="auto_round")
    (folder,) = {file.parent for file in (job.work / "saved").rglob("*.safetensors")}
    read = {"dtype": torch.float16, "device_map": "cpu", "quantization_config": AutoRoundConfig(backend="torch")}
    model = AutoModelForCausalLM.from_pretrained(folder, **read)
    weights = {name: effect(model.get_submodule(name)) for name in job.names}
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    note = {key: said[key] for key in ("sym", "packing_format") if key in said}
    return Packed(weights, stored_bytes(folder, job.names), importlib.metadata.version("auto-round"), note)


def llama_cpp(job: Job) -> Packed:
    """llama.cpp: a GGUF file with its own mixture of types, weighted by an importance matrix where it takes one.

    Types of 256 neighbours do not fit a width of 576, and it takes a larger one instead; the row's `types` says which.
    """
    if job.llama is None or job.imatrix is None or not job.model.endswith(".gguf"):
        raise ValueError("llama.cpp needs a GGUF model, --llama and --imatrix")
    tool, kind = str(job.llama / "llama-quantize"), job.setting["type"]
    dense, packed, decoded = (job.work / f"{name}.gguf" for name in ("dense", "packed", "decoded"))

    def quantize(*args: object) -> str:
        done = subprocess.run([tool, *map(str, args)], capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr, flush=True)
        done.check_returncode()
        return done.stdout + done.stderr

    quantize("--allow-requantize", job.model, dense, "F32")
    said = quantize("--imatrix", job.imatrix, "--token-embedding-type", "F32", dense, packed, kind)
    quantize("--allow-requantize", packed, decoded, "F32")
    state = open_source(str(decoded)).load(torch.float32, "cpu").state_dict()
    weights = {name: state[f"{name}.weight"] for name in job.names}
    # Only the block matrices differ between the two files.
    rest = dense.stat().st_size - sum(weight.nbytes for weight in weights.values())
    counted = Counter(re.findall(r"\] +blk\.\S+\.weight .*(?:converting to|->) +(\S+) \.\.", said))
    note = {"types": dict(counted), "imatrix_tokens": imatrix_tokens(job.imatrix)}
    return Packed(weights, {kind: packed.stat().st_size - rest}, job.llama_version, note)


RUN: dict[str, Callable[[Job], Packed]] = {
    "hqq": hqq,
    "gptqmodel": gptqmodel,
    "auto-round": auto_round,
    "llama.cpp": llama_cpp,
}


def imatrix_tokens(file: Path) -> int:
    """Tokens that an importance matrix was made of."""
    import gguf

    fields = gguf.GGUFReader(str(file)).fields
    chunks, context = (int(fields[f"imatrix.chunk_{what}"].contents()) for what in ("count", "size"))
    return chunks * context


def dense_model(job: Job) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job.dense, dtype=torch.float32)


def windows_of(job: Job) -> torch.Tensor:
    """(windows, context) token ids to calibrate on."""
    return load_file(job.windows)["ids"]


def effect(layer: torch.nn.Module) -> torch.Tensor:
    """The (out, in) matrix that a layer without bias multiplies by, through what it does to the unit vectors.

    Exact: every sum has one term that is not zero.
    """
    with torch.no_grad():
        return layer(torch.eye(layer.infeatures, dtype=torch.float16)).T


def stored_bytes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """Bytes that the safetensors files in `folder` hold for these modules, by the tensors' last name."""
    wanted, stored = set(names), Counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        for key, entry in header.items():
            module, _, kind = key.rpartition(".")
            if module in wanted:
                begin, end = entry["data_offsets"]
                stored[kind] += end - begin
    return dict(stored)


def without_datasets() -> None:
    """Let auto-round be imported where `datasets` (and pyarrow, 45 MB) is not installed.

    It imports a few names from there, and uses them only to fetch calibration texts by name, which is not done here:
    whoever uses one gets an error.
    """
    if importlib.util.find_spec("datasets") is not None:
        return

    def refuse(*_: object, **__: object) -> None:
        raise ImportError("the package datasets is not installed")

    names = "Dataset Features IterableDataset Sequence Value concatenate_datasets load_dataset load_from_disk".split()
    module = types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    for name in names:
        setattr(module, name, type(name, (), {"__new__": refuse}) if name[0].isupper() else refuse)
    sys.modules["datasets"] = module


def _start(log: Path, work: Path) -> None:
    """A worker says what it says in a file, and leaves what it leaves in a folder that goes."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.chdir(work)
    os.environ["TMPDIR"] = os.environ["HF_HOME"] = tempfile.tempdir = str(work)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "inductor")
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is to be fetched


def _work(peer: str, job: Job) -> tuple[Path, dict[str, int], str, Setting, float, int]:
    """In the worker: compress, and leave the decoded weights in a file."""
    if torch.cuda.is_initialized():  # not before: a package may have settings for the allocator
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    packed = RUN[peer](job)
    seconds = time.perf_counter() - begun
    file = job.work / "decoded.safetensors"
    save_file({name: weight.detach().float().cpu().contiguous() for name, weight in packed.weights.items()}, file)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return file, packed.stored, packed.version, packed.note, seconds, peak


def score(lab: Lab, name: str, file: Path, stored: dict[str, int], seconds: float, peak: int) -> Arm:
    """Put the decoded weights into the model and measure."""
    weights, error, energy = load_file(file), 0.0, 0.0
    for info in lab.blocks:
        original, target = (w[f"{info.name}.weight"] for w in (lab.original, lab.weights))
        decoded = weights[info.name].to(target.device)
        if decoded.shape != target.shape:
            raise ValueError(f"{info.name}: decoded to {tuple(decoded.shape)}, the model has {tuple(target.shape)}")
        with torch.no_grad():
            target.copy_(decoded)
        error += (original - target).double().square().sum().item()
        energy += original.double().square().sum().item()
    bits = 8 * sum(stored.values()) / sum(info.weights for info in lab.blocks)
    result = lab.evaluate(kl=False)
    print(f"{name:28s} {bits:7.4f} b  ppl {result.perplexity:12.3f}  {seconds:6.1f} s  {stored}", flush=True)
    return Arm(name, bits, result.perplexity, result.kl, result.top1, error / energy, seconds, peak)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS, help="only these packages")
    parser.add_argument("--deadline", type=float, default=None, help="begin no arm after so many seconds")
    parser.add_argument("--resume", action="store_true", help="keep the arms that OUTPUT holds already")
    parser.add_argument("--llama", type=Path, default=None, help="folder that holds llama-quantize")
    parser.add_argument("--llama-version", default="unknown", help="llama.cpp's commit, which the tool does not tell")
    parser.add_argument("--imatrix", type=Path, default=None, help="what llama-imatrix made of the calibration text")


@dataclass
class Results:
    """Arms by (peer, name), what their rows say besides, and why an arm is not there."""

    arms: dict[tuple[str, str], Arm]
    besides: dict[tuple[str, str], Setting]
    left_out: dict[str, str]
    run: int = 0

    def rows(self) -> list[Setting]:
        """In the order of ARMS."""
        kept = [arm[:2] for arm in ARMS if arm[:2] in self.arms]
        return [{**self.besides[key], **asdict(self.arms[key])} for key in kept]


def main() -> None:
    args = arguments(__doc__, "wiki.test.raw", "results/peers.json", calibration=True, more=_more)
    begun = time.time()
    lab = Lab(args.model, args.text, args.device, args.windows)
    original = original_of(lab, args)
    text = args.data_dir / "c4" / "c4-train-sample.jsonl"
    ids = windows_from_files([text], load_tokenizer(args.model), args.calibration_windows, args.calibration_context)
    calibration = {"text": text.name, "windows": ids.shape[0], "context": ids.shape[1]}
    results = resumed(args.output) if args.resume else Results({}, {}, {})
    earlier = earlier_runs(args.output, args.resume)
    results.run = len(earlier)
    command = "python benchmarks/peers.py --model MODEL --data-dir DATA"

    def keep() -> None:
        content = {"calibration": calibration, "left_out": results.left_out, "arms": results.rows()}
        save(args.output, lab, command, original, earlier, **content)

    with tempfile.TemporaryDirectory() as temporary:
        job = prepared(args, lab, ids, Path(temporary))
        for peer in args.peers:
            with worker(peer, job.work) as pool:
                for _, name, setting in (arm for arm in ARMS if arm[0] == peer and arm[:2] not in results.arms):
                    if args.deadline is not None and time.time() - begun > args.deadline:
                        results.left_out[name] = "out of time"
                    else:
                        attempt(pool, lab, peer, name, dataclasses.replace(job, setting=setting), results)
                    keep()


def prepared(args: argparse.Namespace, lab: Lab, ids: torch.Tensor, base: Path) -> Job:
    """What all arms share, with the dense model and the calibration text in files below `base`."""
    lab.reference.save_pretrained(base / "dense")
    load_tokenizer(args.model).save_pretrained(base / "dense")
    save_file({"ids": ids.contiguous()}, base / "windows.safetensors")
    return Job(
        setting={},
        names=tuple(info.name for info in lab.blocks),
        dense=base / "dense",
        model=str(Path(args.model).resolve()) if Path(args.model).exists() else args.model,
        windows=base / "windows.safetensors",
        device=args.device,
        work=base,
        llama=args.llama and args.llama.resolve(),
        llama_version=args.llama_version,
        imatrix=args.imatrix and args.imatrix.resolve(),
    )


def attempt(pool: concurrent.futures.Executor, lab: Lab, peer: str, name: str, job: Job, results: Results) -> None:
    """Run and score one arm; if it fails, note why, for the others go on."""
    with tempfile.TemporaryDirectory(dir=job.work) as work:
        try:
            made = pool.submit(_work, peer, dataclasses.replace(job, work=Path(work))).result()
            file, stored, version, note, seconds, peak = made
            results.arms[peer, name] = dataclasses.replace(
                score(lab, name, file, stored, seconds, peak), run=results.run
            )
        except (Exception, SystemExit) as problem:
            results.left_out[name] = f"{type(problem).__name__}: {str(problem).strip()[:300]}"
            print(f"{name:28s} {results.left_out[name]}\n{tail(job.work / f'{peer}.log')}", flush=True)
            return
    results.left_out.pop(name, None)
    package = {"name": peer, "version": version}
    results.besides[peer, name] = {
        "group": peer,
        "package": package,
        "setting": {**job.setting, **note},
        "stored": stored,
    }


def worker(peer: str, base: Path) -> concurrent.futures.ProcessPoolExecutor:
    """A process for one peer: packages that patch others cannot touch what measures them."""
    (base / peer).mkdir()
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, context, _start, (base / f"{peer}.log", base / peer))


def tail(log: Path, lines: int = 12) -> str:
    """The end of what a worker said."""
    said = log.read_text(errors="replace").replace("\r", "\n").splitlines() if log.is_file() else []
    return "\n".join(f"  | {line[:200]}" for line in said[-lines:])


def resumed(path: Path) -> Results:
    """What an earlier run left in its file."""
    if not path.is_file():
        return Results({}, {}, {})
    result = json.loads(path.read_text(encoding="utf-8"))
    names = ("group", "package", "setting", "stored")
    besides = {(row["group"], row["name"]): {key: row[key] for key in names} for row in result["arms"]}
    return Results(finished(path), besides, result["left_out"])


if __name__ == "__main__":
    main()
