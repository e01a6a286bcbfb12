"""A checkpoint larger than the memory it is compressed in, under a limit that the operating system holds.

    python benchmarks/large.py --folder /big/disk

Makes a random Llama of 3.0 B parameters in bfloat16, shard by shard, and compresses it with round-to-nearest in a
process whose data (RLIMIT_DATA: heap and anonymous mappings, on Linux) may not exceed the promise: the working set of
the largest matrix and 1.5 GB. Before that it makes sure that the limit bites. Then once more with calibration, under
the peak that --dry-run predicts, which counts hessians too: the stream goes through all blocks, and a few matrices,
one down_proj among them, are fitted along it, since all would take hours on a CPU; the rest is kept. Writes
results/large.json; takes 13 GB of disk.
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

from reallm.checkpoint import read_ledger
from reallm.evaluate.measure import versions
from reallm.pipeline.cost import COPIES_WHILE_FITTING
from reallm.source import meta_model

COMPRESS = "import sys; from reallm.cli import main; sys.exit(main(sys.argv[1:]))"
BEYOND = 1_500_000_000  # bytes promised beyond the working set
# A text of about 4 windows, and matrices of the first, the middle and the last block.
TEXT = Path(__file__).parents[1] / "docs" / "artifact.md"
WINDOWS, CONTEXT = 4, 256
CALIBRATED = """
rules:
- {match: "*", format: {format: rotated, base: {format: e8, bits: 2}}}
"""
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


def make_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 256 tokens and an end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(["</s>", *letters])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


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
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="place for 13 GB")
    parser.add_argument("--layers", type=int, default=WHOLE["num_hidden_layers"])
    parser.add_argument("--recipe", default="rtn4")
    parser.add_argument("--output", type=Path, default=Path("results/large.json"))
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        model = place / "model"
        model.mkdir()
        made = make_model(model, num_hidden_layers=options.layers)
        make_tokenizer(model)
        limit = COPIES_WHILE_FITTING * 4 * made["largest_matrix"] + BEYOND
        allocate = f"import numpy; numpy.ones(int({limit / 8 * 1.02}))"
        code, *_ = limited([sys.executable, "-c", allocate], limit)
        if code != 1:
            raise SystemExit(f"RLIMIT_DATA does not hold here: {limit:,} bytes and 2 % more could be had")
        arms = {"without data": compressed(model, place / "out", limit, ["--recipe", options.recipe])}
        (place / "recipe.yaml").write_text(CALIBRATED)
        some = along_the_stream(options.layers)
        given = ["--recipe", str(place / "recipe.yaml"), "--calibration", str(TEXT), *some]
        given += ["--calibration-windows", str(WINDOWS), "--calibration-context", str(CONTEXT)]
        predicted = foretold_bytes(model, place / "recipe.yaml", tuple(some[1::2]))
        arms["calibrated"] = compressed(model, place / "out", predicted, given)
        arms["calibrated"] |= {"windows": WINDOWS, "context": CONTEXT, "include": some[1::2]}
    finally:
        shutil.rmtree(place)
    result = {
        "command": f"python benchmarks/large.py --layers {options.layers} --recipe {options.recipe}",
        **made,
        "arms": arms,
        "commit": commit(),
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def along_the_stream(layers: int) -> list[str]:
    """Options that leave the embedding, k and v of three blocks, and one down_proj."""
    first, middle, last = 0, layers // 2, layers - 1
    patterns = [f"model.layers.{number}.self_attn.[kv]_proj" for number in sorted({first, middle, last})]
    patterns += [f"model.layers.{middle}.mlp.down_proj", "model.embed_tokens"]
    return [word for pattern in patterns for word in ("--include", pattern)]


def foretold_bytes(model: Path, recipe: Path, include: tuple[str, ...]) -> int:
    """Peak memory of the calibrated run, as --dry-run says it."""
    from reallm.pipeline import Settings, estimate, prepare

    chosen = {"calibration": (str(TEXT),), "calibration_windows": WINDOWS, "calibration_context": CONTEXT}
    return estimate(prepare(model, Settings(recipe=str(recipe), include=include, **chosen))).peak_memory_bytes


def compressed(model: Path, out: Path, limit: int, given: list[str]) -> dict[str, Any]:
    """What a run under the limit took and wrote; the artifact is removed."""
    code, seconds, peak, said = limited(
        [sys.executable, "-c", COMPRESS, "compress", str(model), "-o", str(out), *given], limit
    )
    print(said)
    if code:
        raise SystemExit(f"exit code {code} under {limit:,} bytes")
    ledger = read_ledger(out)
    shards = len(list(out.glob("*.safetensors")))
    shutil.rmtree(out)
    return {
        "limit_bytes": limit,
        "peak_resident_bytes": peak,
        "seconds": round(seconds, 1),
        "artifact_bytes": ledger.total_bytes,
        "artifact_files": shards,
        "bits_per_weight": ledger.bits_per_weight,
    }


if __name__ == "__main__":
    main()
