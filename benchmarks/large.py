"""A checkpoint larger than the memory it is compressed in, under a limit that the operating system holds.

    python benchmarks/large.py --folder /big/disk

Makes a random Llama of 3.0 B parameters in bfloat16, shard by shard, and compresses it with round-to-nearest in a
process whose data (RLIMIT_DATA: heap and anonymous mappings, on Linux) may not exceed the promise: the working set of
the largest matrix and 1.5 GB. Before that it makes sure that the limit bites. Writes results/large.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lab import commit, machine
from safetensors.torch import save_file

from reallm.artifact import read_ledger
from reallm.evaluate.measure import versions
from reallm.model import meta_model
from reallm.pipeline.cost import COPIES_WHILE_FITTING

COMPRESS = "import sys; from reallm.cli import main; sys.exit(main(sys.argv[1:]))"
BEYOND = 1_500_000_000  # bytes promised beyond the working set
WHOLE = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 29, "vocab_size": 32_000}


def make_model(folder: Path, **sizes: int) -> dict[str, Any]:
    """A random Llama in bfloat16, one decoder block a shard: never more than a block of it is in memory."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        **{**WHOLE, **sizes},
        num_attention_heads=24,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in meta_model(config).state_dict().items():
        if name != "lm_head.weight":
            part = name.split(".")[2] if name.startswith("model.layers.") else "ends"
            shards.setdefault(part, {})[name] = tuple(tensor.shape)
    weight_map, total = {}, 0
    for number, (part, tensors) in enumerate(shards.items()):
        generator = torch.Generator().manual_seed(number)
        made = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, shape in tensors.items()
        }
        save_file(made, folder / f"model-{part}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(made, f"model-{part}.safetensors")
        total += sum(tensor.nbytes for tensor in made.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    matrices = [shape for tensors in shards.values() for shape in tensors.values() if len(shape) == 2]
    return {
        "nbytes": total,
        "parameters": total // 2,
        "largest_matrix": max(rows * columns for rows, columns in matrices),
    }


def limited(command: list[str], limit: int) -> tuple[int, float, int, str]:
    """(exit code, seconds, peak resident bytes, end of stderr) of a process whose data may not exceed `limit`."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
            # Many malloc arenas keep much memory that none of them uses.
            env=os.environ | {"MALLOC_ARENA_MAX": "2"},
        )
        _, status, usage = os.wait4(process.pid, 0)
        errors.seek(0)
        said = errors.read().decode(errors="replace")[-600:]
    return os.waitstatus_to_exitcode(status), time.perf_counter() - start, usage.ru_maxrss * 1024, said


def main() -> None:
    """Make, compress, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="place for 8 GB")
    parser.add_argument("--layers", type=int, default=WHOLE["num_hidden_layers"])
    parser.add_argument("--recipe", default="rtn4")
    parser.add_argument("--output", type=Path, default=Path("results/large.json"))
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        (place / "model").mkdir()
        made = make_model(place / "model", num_hidden_layers=options.layers)
        limit = COPIES_WHILE_FITTING * 4 * made["largest_matrix"] + BEYOND
        allocate = f"import numpy; numpy.ones(int({limit / 8 * 1.02}))"
        code, *_ = limited([sys.executable, "-c", allocate], limit)
        if code != 1:
            raise SystemExit(f"RLIMIT_DATA does not hold here: {limit:,} bytes and 2 % more could be had")
        out = place / "out"
        arguments = ["compress", str(place / "model"), "-o", str(out), "--recipe", options.recipe]
        code, seconds, peak, said = limited([sys.executable, "-c", COMPRESS, *arguments], limit)
        print(said)
        if code:
            raise SystemExit(f"exit code {code} under {limit:,} bytes")
        ledger = read_ledger(out)
        shards = len(list(out.glob("*.safetensors")))
    finally:
        shutil.rmtree(place)
    result = {
        "command": f"python benchmarks/large.py --layers {options.layers} --recipe {options.recipe}",
        **made,
        "limit_bytes": limit,
        "peak_resident_bytes": peak,
        "seconds": round(seconds, 1),
        "artifact_bytes": ledger.total_bytes,
        "artifact_files": shards,
        "bits_per_weight": ledger.bits_per_weight,
        "commit": commit(),
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
