"""`reallm compress`: compress a model."""

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
            help="Target in bits per weight of the block matrices, all overhead included; met within 1 %, never "
            "exceeded.",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="SIZE",
            help="Limit in bytes for all files written: 60MB (decimal), 57MiB, 800KB, 2GB or a number; never exceeded, "
            "used to 99.5 %.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="NAME|FILE",
            help="Shipped recipe (listed by: reallm recipes) or YAML file that names the formats, instead of a budget; "
            f"default: {DEFAULT_RECIPE}. With a size limit, at most half of its matrices get smaller formats to fit.",
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            metavar="FILE|self",
            help="Calibration text (.txt, .raw, .json, .jsonl; may be repeated), or self: text that the model "
            "generates. Without: no calibration.",
        ),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(
            "--embedding",
            metavar="BITS",
            help="Bits of the embedding: 1 to 8, or keep for unquantized. Default: from the recipe, else 8.",
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            "--head", metavar="BITS", help="Bits of lm_head if it is not tied to the embedding; as --embedding."
        ),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="Device for calibration and fitting: cpu, cuda, cuda:1 …")
    ] = "cpu",
    seed: Seed = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan with its bytes, time, memory and disk space, and stop.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run from its work folder.")] = False,
    bits_per_parameter: Annotated[
        float | None,
        typer.Option(
            "--bits-per-parameter",
            metavar="B",
            help="[advanced] Size limit as a ratio: 8 × bytes of all files / parameters of the model.",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            metavar="R",
            help="[advanced] Add a low-rank residual of this rank to every block matrix; 0 removes the recipe's.",
        ),
    ] = None,
    calibration_windows: Annotated[
        int,
        typer.Option(
            "--calibration-windows",
            metavar="N",
            help="[advanced] Windows of calibration text; fewer if the text is shorter.",
        ),
    ] = 128,
    calibration_context: Annotated[
        int,
        typer.Option(
            "--calibration-context",
            metavar="N",
            help="[advanced] Tokens per window, at most the context length of the model.",
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
            help="[advanced] Entropy-code stored tensors where that makes them smaller. Default: with --size, or as "
            "the recipe says.",
        ),
    ] = None,
    state_bits: Annotated[
        int | None,
        typer.Option(
            "--state-bits",
            metavar="N",
            help="[advanced] Window in bits of the trellis codes among the candidates of a calibrated budget: 6 to 16, "
            "or 0 for no trellis codes. Default: 16 on a GPU, 0 on a CPU, where 12 takes an hour for 60 million "
            "weights.",
        ),
    ] = None,
    candidates: Candidates = None,
    corrections: Corrections = None,
    analysis: Annotated[
        Path | None,
        typer.Option(
            "--analysis",
            metavar="FOLDER",
            help="[advanced] Cache for the sensitivity analysis behind predicted losses, shared by later runs; "
            "default: .reallm next to OUT.",
        ),
    ] = None,
    fits: Annotated[
        Path | None,
        typer.Option(
            "--fits",
            metavar="FOLDER",
            help="[advanced] Cache for fitted matrices: a matrix with the same format and objective is not fitted "
            "again, whatever the budget. Nothing is ever deleted from it.",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="[advanced] Measure the loss that a calibrated budget predicted, on 4 windows.",
        ),
    ] = True,
) -> None:
    """Compress a model into a folder that from_pretrained loads.

    Give a budget (--bits, --size) or a recipe. With a budget, the format of every matrix is chosen to minimize the
    predicted loss; with --calibration, the loss is predicted from this model and matrices are fitted to its inputs.
    """
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
    no_target = bits is None and size is None and bits_per_parameter is None and recipe is None
    settings = Settings(
        bits=bits,
        recipe=DEFAULT_RECIPE if no_target else recipe,
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
        print(f"stopped; finished matrices are in {work_folder(output)}: add --resume to continue", file=sys.stderr)
        raise
    print(summary(output))
    if recipe is not None and (changes := changes_table(job, output)):
        print(changes)
    if check and job.forecast is not None and job.forecast.calibrated:
        print(loss_line(job, output))


def embedding_format(option: str, bits: str | None) -> Any:
    """Return the format spec for the value of --embedding or --head.

    Errors: RecipeError for anything but 1 to 8 and keep.
    """
    from reallm.allocate.recipe import DEFAULT_EMBEDDING, KEEP
    from reallm.errors import RecipeError

    if bits is None or bits == KEEP:
        return bits
    if bits not in tuple("12345678"):
        raise RecipeError(f"{option} {bits!r} is neither a number from 1 to 8 nor keep")
    return {**DEFAULT_EMBEDDING, "bits": int(bits)}
