"""`reallm tune`: fine-tune a compressed model at the same size."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from reallm.cli.shared_options import Seed


def _rank(word: str) -> int:
    """Parse the rank of an adapter."""
    try:
        return int(word)
    except ValueError:
        raise typer.BadParameter(
            f"{word!r} is not a rank, a whole number such as 8. The folder names the adapter: --adapter 8 -o {word}"
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
            help="Training text (.txt, .raw, .json or .jsonl with a text field) or task data; may be repeated. Task "
            "data is a JSON array or JSON lines with prompt and response or completion; instruction, context and "
            "response (Dolly); instruction, input and output (Alpaca); or messages or conversations (ShareGPT), "
            "rendered by the chat template; its loss covers only the responses.",
        ),
    ],
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="The original model, used as the teacher; required unless end-to-end with --loss ce.",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="blockwise (decoder blocks one at a time), end-to-end, or both in this order.",
        ),
    ] = "end-to-end",
    train: Annotated[
        str,
        typer.Option(
            "--train",
            metavar="GROUPS",
            help="Parameter groups to train, comma-separated: residual, scales, gains, codebooks, decoders (neural "
            "formats; shared ones only end to end), outliers, dense, norms, biases. Add embedding and head to train "
            "these groups in those matrices too.",
        ),
    ] = "residual,scales,gains,codebooks,norms",
    adapter: Annotated[
        int | None,
        typer.Option(
            "--adapter",
            metavar="R",
            parser=_rank,
            help="Train a LoRA adapter of rank R over the frozen compressed model instead, and write only the adapter "
            "to OUT2, in PEFT's format.",
        ),
    ] = None,
    loss: Annotated[
        str,
        typer.Option(
            "--loss",
            metavar="NAME",
            help="End-to-end loss: kl (distillation from the original model), ce (cross-entropy), or mix (the mean of "
            "both).",
        ),
    ] = "kl",
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            metavar="N",
            help="Tokens to train on end to end; default: one epoch. More repeats the text.",
        ),
    ] = None,
    context: Annotated[int, typer.Option("--context", metavar="N", help="Tokens per window.")] = 1024,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Windows per step.")] = 8,
    learning_rate: Annotated[
        float,
        typer.Option(
            "--learning-rate",
            metavar="X",
            help="End-to-end learning rate, relative to the root mean square of each tensor.",
        ),
    ] = 3e-3,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="Device to train on: cpu, cuda, cuda:1 …")
    ] = "cpu",
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run from its work folder.")] = False,
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="NAME", help="[advanced] Dtype of matrix products: auto, float32 or bfloat16."),
    ] = "auto",
    micro_batch: Annotated[
        int | None,
        typer.Option(
            "--micro-batch", metavar="N", help="[advanced] Windows per forward pass; default: the whole batch."
        ),
    ] = None,
    warm_up: Annotated[
        float,
        typer.Option(
            "--warm-up", metavar="X", help="[advanced] Fraction of the steps in which the learning rate rises."
        ),
    ] = 0.05,
    clip: Annotated[
        float, typer.Option("--clip", metavar="X", help="[advanced] Clip the gradient norm of a step to this.")
    ] = 1.0,
    top_k: Annotated[
        int,
        typer.Option(
            "--top-k",
            metavar="K",
            help="[advanced] Run the original model once and cache its top-k log-probabilities on disk; 0 runs it at "
            "every step. The KL then counts all other tokens as one, is lower than the full KL, and is printed as "
            "top-k KL.",
        ),
    ] = 0,
    validation: Annotated[
        list[Path] | None,
        typer.Option(
            "--validation",
            metavar="FILE",
            help="[advanced] Validation text; may be repeated. Default: windows held out from --text.",
        ),
    ] = None,
    validation_windows: Annotated[
        int, typer.Option("--validation-windows", metavar="N", help="[advanced] Windows to validate on.")
    ] = 16,
    validate_every: Annotated[
        int | None,
        typer.Option(
            "--validate-every",
            metavar="N",
            help="[advanced] Steps between validations; default: a twentieth of all steps.",
        ),
    ] = None,
    block_error: Annotated[
        str,
        typer.Option(
            "--block-error",
            metavar="NAME",
            help="[advanced] Block-wise loss: loss weights errors by the gradient of the end-to-end loss, computed "
            "first and stored on disk during the run; outputs weights all errors equally.",
        ),
    ] = "loss",
    block_windows: Annotated[
        int, typer.Option("--block-windows", metavar="N", help="[advanced] Windows for block-wise tuning.")
    ] = 128,
    block_epochs: Annotated[
        int, typer.Option("--block-epochs", metavar="N", help="[advanced] Epochs per block over these windows.")
    ] = 4,
    block_patience: Annotated[
        int,
        typer.Option(
            "--block-patience",
            metavar="N",
            help="[advanced] Epochs without a lower validation error before a block stops.",
        ),
    ] = 1,
    block_learning_rate: Annotated[
        float,
        typer.Option(
            "--block-learning-rate",
            metavar="X",
            help="[advanced] Block-wise learning rate, relative to the root mean square of each tensor.",
        ),
    ] = 1e-3,
    save_memory: Annotated[
        bool,
        typer.Option(
            "--save-memory",
            help="[advanced] Decode constants at every use too, instead of once: less memory, slower.",
        ),
    ] = False,
    no_checkpointing: Annotated[
        bool,
        typer.Option(
            "--no-checkpointing",
            help="[advanced] Keep the activations of all blocks instead of recomputing them (activation "
            "checkpointing): faster, with several times the memory.",
        ),
    ] = False,
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="[advanced] Append every step to this file as JSON.")
    ] = None,
) -> None:
    """Fine-tune a compressed model without changing its size.

    Scales, codebooks, gains, residuals and norms train; codes, formats and bits per weight stay.

    The weights take the same bytes as in OUT, except trained tensors that are entropy-coded (coding: true without
    --size): they are encoded again and may take a few bytes more or fewer. config.json gains a note of some 200 to 400
    bytes. A folder made with --size or --bits-per-parameter stays within its limit however often it is tuned:
    compression reserves 600 bytes for notes, of which the oldest are dropped, and entropy-codes no tensor that trains
    by default. Training other entropy-coded tensors is refused if they could exceed the limit.

    With torchrun, several processes share the work: torchrun --no-python --nproc-per-node 2 -- reallm tune …
    """
    from reallm.checkpoint import work_folder
    from reallm.cli.tables.tune_table import tuned_text
    from reallm.tuning import Settings, run

    settings = Settings(
        text=_paths(text),
        reference=reference,
        method=method,
        train=tuple(group.strip() for group in train.split(",") if group.strip()),
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
            result = run(artifact, output, settings, resume, log, listener)
    except KeyboardInterrupt:
        print(f"stopped; the training state is in {work_folder(output)}: add --resume to continue", file=sys.stderr)
        raise
    if result.is_main_process:
        print(tuned_text(result, artifact, output))


def _paths(files: list[Path] | None) -> tuple[str, ...]:
    return tuple(str(file) for file in files or ())


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a listener that prints events on stderr, one line each; on a terminal, steps overwrite one line."""
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
