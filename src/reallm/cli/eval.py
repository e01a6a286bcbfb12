"""`reallm eval`: perplexity, KL divergence to a reference model, and lm-eval tasks."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from reallm.cli.shared_options import Adapter
from reallm.errors import ReallmError, install_hint

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Compressed model, Hugging Face folder, hub id or GGUF file.")
]


def command(
    model: Model,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Text to score: .txt as is, .raw by the WikiText protocol, .json and .jsonl by their text fields.",
        ),
    ] = None,
    context: Annotated[int, typer.Option("--context", metavar="N", min=2, help="Tokens per window.")] = 2048,
    windows: Annotated[
        int | None, typer.Option("--windows", metavar="N", min=1, help="Score only the first N windows.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAMES",
            help="Zero-shot lm-eval tasks, comma-separated, such as arc_easy,piqa,lambada (lambada_openai). "
            f"Requires lm-eval: {install_hint('tasks')}.",
        ),
    ] = None,
    tasks_data: Annotated[
        Path | None,
        typer.Option(
            "--tasks-data",
            metavar="FOLDER",
            help="Local files instead of the hub's data sets: ARC-Easy-Test.jsonl, ARC-Challenge-Test.jsonl, "
            "piqa-valid.jsonl with piqa-valid-labels.lst, lambada_test.jsonl.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N examples of each task.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="Also measure KL divergence and top-1 agreement with this model, and score the tasks on it.",
        ),
    ] = None,
    adapter: Adapter = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="Device: auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="NAME", help="Compute dtype: auto, float32, bfloat16 or float16."),
    ] = "auto",
    mode: Annotated[
        str, typer.Option("--mode", metavar="NAME", help="decode_at_load, or decode_per_use (slower, less memory).")
    ] = "decode_at_load",
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Verify the checksums of a compressed model first."),
    ] = True,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            metavar="N",
            min=1,
            help="Sequences per forward pass; default: 1 window of a text, 16 task answers.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Also write the JSON to this file; must not exist.")
    ] = None,
) -> None:
    """Measure perplexity, KL divergence and lm-eval tasks.

    The text is split into windows that do not overlap; each is scored on its own. With --reference, also measures KL
    divergence and top-1 agreement.
    """
    from reallm.checkpoint import check_new_file
    from reallm.evaluate.measure import to_json

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if text is None and not names:
        raise ReallmError("nothing to measure: give --text FILE, --tasks NAMES or both")
    for option, value in (("--limit", limit), ("--tasks-data", tasks_data)):
        if value is not None and not names:
            raise ReallmError(f"{option} {value} requires --tasks; --windows N limits a text")
    if output is not None:
        check_new_file(output, "--output")
    options: dict[str, Any] = {"reference": reference, "device": device, "dtype": dtype, "mode": mode, "verify": verify}
    options["adapter"] = adapter
    result: dict[str, Any] = {}
    if names:  # first: an unknown task name fails before a text is scored for minutes
        from reallm.integrations.lm_eval_tasks import score_tasks

        result = score_tasks(model, names, data=tasks_data, limit=limit, batch_size=batch_size or 16, **options)
    if text is not None:
        result = _merge_results(result, _measure_text(model, text, context, windows, batch_size or 1, options))
    if output is not None:
        output.write_text(to_json(result) + "\n", encoding="utf-8")
    print(to_json(result)) if as_json else _print_table(result)


def _measure_text(
    model: str, text: Path, context: int, windows: int | None, batch_size: int, options: dict[str, Any]
) -> dict[str, Any]:
    from reallm.evaluate.measure import measure

    with _progress() as progress:
        return measure(
            model, text, context=context, max_windows=windows, batch_size=batch_size, progress=progress, **options
        )


def _merge_results(tasks: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """Merge the results of tasks and text; times add up."""
    seconds = tasks.get("seconds", 0.0) + text["seconds"]
    return tasks | text | {"seconds": round(seconds, 3), "versions": tasks.get("versions", {}) | text["versions"]}


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (windows done, total) that draws a progress bar on stderr if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:  # rich below 14.3 prints an empty line for a disabled bar
        yield lambda done, total: None
        return
    columns = TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TextColumn("windows"), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_table(result: dict[str, Any]) -> None:
    # Not a rich table: rich wraps or truncates long paths to the terminal width, even without a terminal.
    for name, value in _rows(result):
        print(f"{name:<11} {value}")
    if "tasks" in result:
        print()
        for row in _task_rows(result):
            print("  ".join(row))


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("model", result["model"])]
    if result.get("adapter") is not None:
        rows.append(("adapter", result["adapter"]))
    if "perplexity" in result:
        rows += [
            ("text", f"{result['text']}  sha256 {result['text_sha256'][:12]}…"),
            ("measured", f"{result['windows']} windows of {result['context']} tokens, {result['tokens']:,} scored"),
            ("perplexity", f"{result['perplexity']:.4f}  ({result['nll']:.5f} nats per token)"),
        ]
    if result["reference"] is not None:
        rows.append(("reference", result["reference"]))
    if result.get("kl") is not None:
        rows += [
            ("KL", f"{result['kl']:.5f} nats per token"),
            ("top-1", f"{100 * result['top1']:.2f} % the same most likely token"),
        ]
    return rows + [("time", f"{result['seconds']:.1f} s in {result['dtype']}")]


def _task_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return a header and one row per metric, padded to columns; ± is the standard error."""
    columns = ("model", "stderr"), *([("reference", "reference_stderr")] if result["reference"] is not None else [])
    rows = [("task", "examples", "metric", *(column for column, _ in columns))]
    for task in result["tasks"]:
        for name, figure in task["metrics"].items():
            values = (_figure(name, figure[value], figure[error]) for value, error in columns)
            rows.append((task["task"], f"{task['examples']:,}", name, *values))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [tuple(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _figure(name: str, value: float, stderr: float | None) -> str:
    """Format a metric: accuracies in percent, others unchanged."""
    factor, unit, places = (100, " %", ".2f") if name.startswith(("acc", "exact_match")) else (1, "", ".4g")
    error = "" if stderr is None else f" ± {format(factor * stderr, places)}"
    return f"{format(factor * value, places)}{error}{unit}"
