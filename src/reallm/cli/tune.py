"""`reallm tune`: a compressed model made better at the same size."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from reallm.cli.shared_options import Seed


def _rank(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise typer.BadParameter(
            f"{word!r} is no rank, a whole number such as 8. An adapter's name is its folder's: --adapter 8 -o {word}"
        ) from None


def command(
    artifact: Annotated[Path, typer.Argument(metavar="OUT", help="Folder written by reallm compress or reallm tune.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT2", help="Folder to write; must not exist.")],
    text: Annotated[
        list[Path],
        typer.Option(
            "--text",
            "--data",
            metavar="FILE",
            help="Text to learn from (.txt, .raw, .json or .jsonl with text), or task data, of which the responses "
            "count: .json or .jsonl, an array or lines, with prompt and response or completion, instruction, context "
            "and response (Dolly), instruction, input and output (Alpaca), messages or conversations (ShareGPT), "
            "rendered by the chat template; may be repeated.",
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", metavar="MODEL", help="The original model; needed for all but cross-entropy alone."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", metavar="NAME", help="blockwise, end-to-end, or both, one after the other.")
    ] = "end-to-end",
    train: Annotated[
        str,
        typer.Option(
            "--train",
            metavar="WORDS",
            help="What trains, with commas between: residual, scales, gains, codebooks, decoders (of neural formats; "
            "those that matrices share train end to end), outliers, dense, norms, biases; embedding and head add "
            "those matrices' parts.",
        ),
    ] = "residual,scales,gains,codebooks,norms",
    adapter: Annotated[
        int | None,
        typer.Option(
            "--adapter",
            metavar="R",
            parser=_rank,
            help="Train a new residual of rank R over the frozen model instead, and write only that, in PEFT's form, "
            "to OUT2, which is its name.",
        ),
    ] = None,
    loss: Annotated[
        str,
        typer.Option(
            "--loss", metavar="NAME", help="End-to-end: kl to the original, ce (cross-entropy), or mix, half each."
        ),
    ] = "kl",
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            metavar="N",
            help="Tokens to train on end to end; without, the text once. More goes round again.",
        ),
    ] = None,
    context: Annotated[int, typer.Option("--context", metavar="N", help="Tokens in a window.")] = 1024,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Windows per step.")] = 8,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            "--micro-batch", metavar="N", help="Windows that go through the model at once; without, the batch."
        ),
    ] = None,
    learning_rate: Annotated[
        float,
        typer.Option(
            "--learning-rate", metavar="X", help="End-to-end, relative to the size of each tensor that trains."
        ),
    ] = 3e-3,
    warm_up: Annotated[
        float, typer.Option("--warm-up", metavar="X", help="Share of the steps in which the rate rises.")
    ] = 0.05,
    clip: Annotated[float, typer.Option("--clip", metavar="X", help="Largest norm of a step's gradient.")] = 1.0,
    top_k: Annotated[
        int,
        typer.Option(
            "--top-k",
            metavar="K",
            help="Ask the original once, and keep the top K tokens on disk; 0 asks at every step. The KL then "
            "takes all other tokens as one, which makes it smaller than the KL of all, and is printed as top-k KL.",
        ),
    ] = 0,
    validation: Annotated[
        list[Path] | None,
        typer.Option(
            "--validation", metavar="FILE", help="Text to validate on; without, windows of --text that do not train."
        ),
    ] = None,
    validation_windows: Annotated[
        int, typer.Option("--validation-windows", metavar="N", help="Windows to validate on.")
    ] = 16,
    validate_every: Annotated[
        int | None,
        typer.Option("--validate-every", metavar="N", help="Steps between validations; without, a twentieth of all."),
    ] = None,
    block_error: Annotated[
        str,
        typer.Option(
            "--block-error",
            metavar="NAME",
            help="What an error of a block's output costs: loss what the end-to-end loss would, by gradients of the "
            "original that are kept on disk meanwhile; outputs counts all alike.",
        ),
    ] = "loss",
    block_windows: Annotated[
        int, typer.Option("--block-windows", metavar="N", help="Windows that blocks are tuned on.")
    ] = 128,
    block_epochs: Annotated[
        int, typer.Option("--block-epochs", metavar="N", help="Rounds of these windows for each block.")
    ] = 4,
    block_patience: Annotated[
        int,
        typer.Option("--block-patience", metavar="N", help="Rounds without a better validation that a block is given."),
    ] = 1,
    block_learning_rate: Annotated[
        float,
        typer.Option(
            "--block-learning-rate", metavar="X", help="Block-wise, relative to the size of each tensor that trains."
        ),
    ] = 1e-3,
    save_memory: Annotated[
        bool, typer.Option("--save-memory", help="Decode at every use also what training does not change.")
    ] = False,
    no_checkpointing: Annotated[
        bool,
        typer.Option(
            "--no-checkpointing",
            help="Keep the activations of all blocks in place of running each once more for its gradient: faster, with "
            "several times the memory.",
        ),
    ] = False,
    seed: Seed = 0,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="Where to train: cpu, cuda, cuda:1 …")
    ] = "cpu",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="NAME", help="What products are computed in: auto, float32 or bfloat16.")
    ] = "auto",
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="Append every step to this file, as JSON.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the work folder of an interrupted run.")] = False,
) -> None:
    """Train scales, codebooks, gains and residuals of a compressed model; codes, formats and bits per weight stay.

    The weights take the bytes they took in OUT, unless what trained is entropy-coded (coding: true without --size):
    that is coded again, and may take some more or fewer. config.json grows by a note of some 200 to 400 bytes. A folder
    that was made by --size or --bits-per-parameter stays within that however often it is tuned: compressing leaves 600
    bytes for notes, of which old ones give way, and codes nothing that trains by default. What else is coded and could
    outgrow the size is refused. Several processes share the work when started by torchrun:
    torchrun --no-python --nproc-per-node 2 -- reallm tune …
    """
    from reallm.checkpoint import work_folder
    from reallm.cli.tables.tune_table import tuned_text
    from reallm.tuning import Settings, run

    settings = Settings(
        text=_paths(text),
        reference=reference,
        method=method,
        train=tuple(word.strip() for word in train.split(",") if word.strip()),
        adapter=adapter,
        loss=loss,
        tokens=tokens,
        context=context,
        batch=batch,
        micro_batch=micro_batch,
        learning_rate=learning_rate,
        warm_up=warm_up,
        clip=clip,
        top_k=top_k,
        validation=_paths(validation),
        validation_windows=validation_windows,
        validate_every=validate_every,
        block_error=block_error,
        block_windows=block_windows,
        block_epochs=block_epochs,
        block_patience=block_patience,
        block_learning_rate=block_learning_rate,
        save_memory=save_memory,
        checkpointing=not no_checkpointing,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    try:
        with _progress() as listener:
            tuned = run(artifact, output, settings, resume, log, listener)
    except KeyboardInterrupt:
        print(f"stopped; what is learned is in {work_folder(output)}: add --resume to go on", file=sys.stderr)
        raise
    if tuned.is_main_process:
        print(tuned_text(tuned, artifact, output))


def _paths(files: list[Path] | None) -> tuple[str, ...]:
    return tuple(str(file) for file in files or ())


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that shows events on stderr: a line each, steps on a line that is written over."""
    from rich.console import Console

    from reallm.cli.tables.tune_table import event_line

    console = Console(stderr=True)
    tenths = -1

    def show(event: dict[str, Any]) -> None:
        nonlocal tenths
        if (line := event_line(event)) is None:
            return
        if "steps" not in event:
            console.print(line, highlight=False, markup=False)
        elif console.is_terminal:
            console.print(f"{line:<110}", end="\r", highlight=False, markup=False, soft_wrap=True)
        elif event["step"] * 10 // event["steps"] > tenths:
            tenths = event["step"] * 10 // event["steps"]
            console.print(line, highlight=False, markup=False)

    yield show
