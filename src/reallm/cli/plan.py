"""`reallm plan`: choose formats for a budget and write them as a recipe."""

from pathlib import Path
from typing import Annotated

import typer

from reallm.cli.compress import embedding_format
from reallm.cli.progress import progress_bar
from reallm.cli.shared_options import Candidates, Corrections, Exclude, Include, Model, Seed, note_missing_formats


def command(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Recipe to write (.yaml), or with --sizes predicted losses (.json); must not exist.",
        ),
    ],
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits",
            "-b",
            metavar="B",
            help="Target in bits per weight of the block matrices, all overhead included.",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="SIZE", help="Limit in bytes for all files of the artifact: 60MB, 57MiB, …"),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            "--sizes",
            metavar="SIZE,SIZE,…",
            help="Several size limits: write the predicted loss and plan of each to FILE, and with matplotlib a plot "
            "next to it.",
        ),
    ] = None,
    bits_per_parameter: Annotated[
        float | None,
        typer.Option(
            "--bits-per-parameter",
            metavar="B",
            help="Size limit as a ratio: 8 × bytes of all files / parameters of the model.",
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            metavar="FILE|self",
            help="Text to measure how errors change the end-to-end loss (.txt, .raw, .json, .jsonl; may be repeated), "
            "or self: text that the model generates. Without: typical sensitivities per role.",
        ),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(
            "--embedding",
            metavar="BITS",
            help="Bits of the embedding: 1 to 8, or keep for unquantized. Default: chosen.",
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
        str, typer.Option("--device", metavar="NAME", help="Device for the analysis: cpu, cuda, cuda:1 …")
    ] = "cpu",
    seed: Seed = 0,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            metavar="NAME",
            help="What fits will minimise: outputs or guided, as in compress.",
        ),
    ] = None,
    analysis_windows: Annotated[
        int,
        typer.Option(
            "--analysis-windows",
            metavar="N",
            min=1,
            help="[advanced] Windows of calibration text for the sensitivity analysis.",
        ),
    ] = 16,
    analysis_context: Annotated[
        int, typer.Option("--analysis-context", metavar="N", min=2, help="[advanced] Tokens per analysis window.")
    ] = 1024,
    state_bits: Annotated[
        int | None,
        typer.Option(
            "--state-bits",
            metavar="N",
            help="[advanced] Window in bits of the trellis codes among the candidates: 6 to 16, or 0 for none.",
        ),
    ] = None,
    candidates: Candidates = None,
    corrections: Corrections = None,
    analysis: Annotated[
        Path | None,
        typer.Option(
            "--analysis",
            metavar="FOLDER",
            help="[advanced] Cache for the sensitivity analysis, shared by later runs; default: .reallm next to FILE.",
        ),
    ] = None,
) -> None:
    """Choose a format for every matrix, and write a recipe.

    Edit the recipe if you like, and run it with reallm compress --recipe FILE.
    """
    import json

    from reallm.allocate.options import parse_size
    from reallm.checkpoint import check_new_file
    from reallm.cli.tables.costs import budget_table, plan_table
    from reallm.cli.tables.predictions import frontier, plan_file, plot_frontier
    from reallm.errors import RecipeError
    from reallm.pipeline import Settings, prepare
    from reallm.source import open_source

    if sizes is not None and (size is not None or bits is not None or bits_per_parameter is not None):
        raise RecipeError("--sizes cannot be combined with another budget; give one")
    plot = output.with_suffix(".png")
    check_new_file(output, "--output", (".yaml", ".yml") if sizes is None else (".json",))
    if sizes is not None:
        check_new_file(plot, "--output")

    def settings(nbytes: int | None) -> Settings:
        return Settings(
            size=nbytes,
            bits=bits,
            bits_per_parameter=bits_per_parameter,
            seed=seed,
            device=device,
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            embedding=embedding_format("--embedding", embedding),
            head=embedding_format("--head", head),
            calibration=tuple(calibration or ()),
            objective=objective,
            analysis_windows=analysis_windows,
            analysis_context=analysis_context,
            state_bits=state_bits,
            corrections=None if corrections is None else str(corrections),
            candidates=tuple(candidates or ()),
            analysis=str(analysis or output.absolute().parent / ".reallm"),
        )

    if sizes is None:
        with progress_bar() as progress:
            job = prepare(model, settings(None if size is None else parse_size(size)), progress)
        if job.forecast is not None:
            note_missing_formats()
        output.write_text(plan_file(job), encoding="utf-8")
        print(plan_table(job), budget_table(job), f"written: {output}", sep="\n\n")
        return
    source = open_source(model)
    with progress_bar() as progress:
        jobs = [prepare(source, settings(parse_size(word)), progress) for word in sizes.split(",")]
    note_missing_formats()
    points = frontier(jobs)
    output.write_text(json.dumps(points, indent=1) + "\n", encoding="utf-8")
    for job in jobs:
        print(budget_table(job), end="\n\n")
    print(
        f"written: {output}"
        + (f", {plot}" if plot_frontier(points, plot) else " (no plot: matplotlib is not installed)")
    )
