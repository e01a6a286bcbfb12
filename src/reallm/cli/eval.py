"""`reallm eval`: perplexity of a text, and the distance to a reference."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from reallm.errors import ReallmError

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Compressed model, Hugging Face folder, hub id or GGUF file.")
]


def command(
    model: Model,
    text: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Text to score: .txt as it is, .raw by the WikiText protocol, .jsonl by its text fields.",
        ),
    ],
    context: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens in a window.")] = 2048,
    windows: Annotated[int | None, typer.Option(metavar="N", min=1, help="Score only the first N windows.")] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Also measure KL and top-1 agreement with this model.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="What the models compute in: auto, float32, bfloat16 or float16.")
    ] = "auto",
    mode: Annotated[
        str, typer.Option(metavar="NAME", help="decode_at_load, or decode_per_use: slower, in less memory.")
    ] = "decode_at_load",
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Compare a compressed model's tensors with their checksums first."),
    ] = True,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Windows that go through a model at once.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the JSON to this file.")] = None,
) -> None:
    """Perplexity of a text; with --reference also KL divergence and top-1 agreement.

    The text is cut into windows that do not overlap, each is scored on its own.
    """
    from reallm.evaluate.measure import measure, to_json

    if output is not None and not output.absolute().parent.is_dir():
        raise ReallmError(f"--output {output}: there is no folder {output.parent}")
    with _progress() as progress:
        result = measure(
            model,
            text,
            context=context,
            max_windows=windows,
            reference=reference,
            batch_size=batch_size,
            progress=progress,
            device=device,
            dtype=dtype,
            mode=mode,
            verify=verify,
        )
    if output is not None:
        output.write_text(to_json(result) + "\n", encoding="utf-8")
    print(to_json(result)) if as_json else _print_table(result)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A function (windows done, in all) that draws a bar with the time left on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), TextColumn("windows"), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_table(result: dict[str, Any]) -> None:
    # Not a rich table: it folds or cuts long paths at the width of the terminal, also when there is none.
    for name, value in _rows(result):
        print(f"{name:<11} {value}")


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("model", result["model"]),
        ("text", f"{result['text']}  sha256 {result['text_sha256'][:12]}…"),
        ("measured", f"{result['windows']} windows of {result['context']} tokens, {result['tokens']:,} scored"),
        ("perplexity", f"{result['perplexity']:.4f}  ({result['nll']:.5f} nats a token)"),
    ]
    if result["reference"] is not None:
        rows += [
            ("reference", result["reference"]),
            ("KL", f"{result['kl']:.5f} nats a token"),
            ("top-1", f"{100 * result['top1']:.2f} % the same most likely token"),
        ]
    return rows + [("time", f"{result['seconds']:.1f} s in {result['dtype']}")]
