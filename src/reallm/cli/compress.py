"""`reallm compress`: a model in fewer bytes."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from reallm.cli.progress import progress_bar
from reallm.cli.shared_options import Candidates, Corrections, Exclude, Include, Model, Seed, note_missing_formats

DEFAULT_RECIPE = "mixed"


def command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to write; must not exist.")],
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits",
            "-b",
            metavar="B",
            help="Stored bits per block weight, scales and codebooks included; met within 1 %, never exceeded.",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="SIZE",
            help="Bytes of everything that is written: 60MB (decimal), 57MiB, 800KB, 2GB or a number; never exceeded, "
            "and used to 99.5 %.",
        ),
    ] = None,
    bits_per_parameter: Annotated[
        float | None,
        typer.Option(
            "--bits-per-parameter",
            metavar="B",
            help="The same as bits: 8 times the bytes of everything / parameters of the model.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="NAME|FILE",
            help=f"Shipped recipe (see: reallm recipes) or YAML file, in place of a budget; default: {DEFAULT_RECIPE}. "
            "Beside a size it is kept if it fits; if it does not, at most half of its matrices get smaller formats.",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", metavar="R", help="Low-rank residual of this rank for every block matrix; 0 removes a recipe's."
        ),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(
            "--embedding", metavar="BITS", help="Bits of the embedding: 1 to 8, or keep. Without: the recipe's, else 8."
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            "--head", metavar="BITS", help="Bits of the output head where it is not tied to the embedding: as above."
        ),
    ] = None,
    seed: Seed = 0,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="Where to fit: cpu, cuda, cuda:1 …")] = "cpu",
    include: Include = None,
    exclude: Exclude = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            metavar="FILE|self",
            help="Text to calibrate on (.txt, .raw, .json, .jsonl; may be repeated), or self: text the model writes "
            "itself.",
        ),
    ] = None,
    calibration_windows: Annotated[
        int,
        typer.Option(
            "--calibration-windows", metavar="N", help="Windows of calibration text; fewer if the text is shorter."
        ),
    ] = 128,
    calibration_context: Annotated[
        int,
        typer.Option(
            "--calibration-context", metavar="N", help="Tokens per window; at most what the model was made for."
        ),
    ] = 2048,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            metavar="NAME",
            help="What calibration minimizes: outputs (squared error of every matrix's outputs) or guided (the same, "
            "tokens weighted by the gradient of the end-to-end loss). "
            "Default: what the recipe says, guided under a budget, outputs without.",
        ),
    ] = None,
    coding: Annotated[
        bool | None,
        typer.Option(
            "--entropy-coding/--no-entropy-coding",
            help="Store tensors entropy-coded where that makes them smaller; default: with --size, or as recipes say.",
        ),
    ] = None,
    state_bits: Annotated[
        int | None,
        typer.Option(
            "--state-bits",
            metavar="N",
            help="Window of the trellis codes that a budget with calibration chooses from: 6 to 16, or 0 for none. "
            "By default 16 on a GPU and none on a CPU, where 12 take an hour for 60 million weights.",
        ),
    ] = None,
    corrections: Corrections = None,
    candidates: Candidates = None,
    analysis: Annotated[
        Path | None,
        typer.Option(
            "--analysis",
            metavar="FOLDER",
            help="Where the analysis behind predicted losses is kept for the next budget; default: .reallm beside OUT.",
        ),
    ] = None,
    fits: Annotated[
        Path | None,
        typer.Option(
            "--fits",
            metavar="FOLDER",
            help="Keep fitted matrices here, and take those that are here already: the same matrix in the same format "
            "under the same objective, whatever the budget. Nothing is ever removed from it.",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="Measure what a budget with calibration has predicted, on 4 windows."),
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print plan, bytes, time, memory and disk, and stop before any work.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the work folder of an interrupted run.")] = False,
) -> None:
    """Compress a model into a folder that from_pretrained loads."""
    from reallm.allocate.options import parse_size
    from reallm.checkpoint import check_output, work_folder
    from reallm.cli.tables.changes import changes_table
    from reallm.cli.tables.costs import analysis_line, calibration_line, cost_table, plan_table
    from reallm.cli.tables.ledger_table import summary
    from reallm.cli.tables.names import model_name
    from reallm.cli.tables.predictions import loss_line
    from reallm.cli.tables.text_table import size as in_units
    from reallm.pipeline import Settings, prepare, run, work_bytes

    if not dry_run:
        check_output(output, resume)
    no_goal = bits is None and size is None and bits_per_parameter is None and recipe is None
    settings = Settings(
        bits=bits,
        recipe=DEFAULT_RECIPE if no_goal else recipe,
        size=None if size is None else parse_size(size),
        bits_per_parameter=bits_per_parameter,
        rank=rank,
        seed=seed,
        device=device,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        embedding=embedding_format("--embedding", embedding),
        head=embedding_format("--head", head),
        calibration=tuple(calibration or ()),
        calibration_windows=calibration_windows,
        objective=objective,
        calibration_context=calibration_context,
        coding=coding,
        state_bits=state_bits,
        corrections=None if corrections is None else str(corrections),
        candidates=tuple(candidates or ()),
        analysis=str(analysis or output.absolute().parent / ".reallm"),
        fits=None if fits is None else str(fits),
    )
    with progress_bar() as progress:
        job = prepare(model, settings, progress, analyse=not dry_run)
    if job.settings.calibration:
        print(f"calibration: {calibration_line(job, calibration_windows)}", file=sys.stderr)
    if job.forecast is not None:
        note_missing_formats()
    if dry_run:
        print(*filter(None, (plan_table(job), cost_table(job), analysis_line(job))), sep="\n\n")
        return
    print(f"work folder: {work_folder(output)}, up to {in_units(work_bytes(job))}, removed at the end", file=sys.stderr)
    if job.source.full_load_reason:
        print(
            f"{model_name(job.source)} is read into memory as a whole: {job.source.full_load_reason}", file=sys.stderr
        )
    try:
        with progress_bar() as progress:
            run(job, output, resume, progress)
    except KeyboardInterrupt:
        print(f"stopped; finished matrices are in {work_folder(output)}: add --resume to go on", file=sys.stderr)
        raise
    print(summary(output))
    if recipe is not None and (changes := changes_table(job, output)):
        print(changes)
    if check and job.forecast is not None and job.forecast.calibrated:
        print(loss_line(job, output))


def embedding_format(option: str, bits: str | None) -> Any:
    """The format an option's value stands for.

    Errors: RecipeError for anything but 1 to 8 and keep.
    """
    from reallm.allocate.recipe import DEFAULT_EMBEDDING, KEEP
    from reallm.errors import RecipeError

    if bits is None or bits == KEEP:
        return bits
    if bits not in tuple("12345678"):
        raise RecipeError(f"{option} {bits!r} is neither a number from 1 to 8 nor keep")
    return {**DEFAULT_EMBEDDING, "bits": int(bits)}
