"""Score multiple-choice and last-word tasks with lm-eval, on local files where present.

Prompts, scoring and metrics are those of lm-eval (EleutherAI's lm-evaluation-harness); a local file only replaces the
hub's data set. Needs `pip install ".[tasks]"`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from reallm import hf
from reallm.errors import SourceError, TextError, install_hint
from reallm.evaluate.load_options import load_options
from reallm.evaluate.measure import versions

Rows = list[dict[str, Any]]

# Bootstrap iterations for the standard error of a perplexity; accuracies need none. lm-eval's 100,000 take a minute.
_BOOTSTRAP_ITERATIONS = 1000
_SPLIT = "test"


@dataclass(frozen=True)
class _LocalTask:
    """A task with local files: its name in lm-eval, and the function from files to rows of the hub's data set."""

    task: str
    files: tuple[str, ...]
    rows: Callable[..., Rows]


def score_tasks(
    model: str,
    names: Sequence[str],
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    reference: str | None = None,
    batch_size: int = 16,
    device: str = "auto",
    dtype: str = "auto",
    mode: str = hf.DECODE_AT_LOAD,
    verify: bool = True,
    adapter: str | Path | None = None,
) -> dict[str, Any]:
    """Return zero-shot metrics of a model, and of `reference` if given, on tasks of lm-eval; a dict for JSON.

    `names` are lm-eval's, or `lambada`, which is its lambada_openai. Tasks whose files (see LOCAL) are in the folder
    `data` read those; lm-eval loads the data of all others from the hub. Only the first `limit` examples are
    scored. `adapter` is a folder with an adapter for the model, not for the reference.
    `tasks` is a list of {task, data, examples, metrics: {name: {model, stderr, reference, reference_stderr}}};
    `data` is the sha256 of the files by name, or the hub's data set.
    Errors: SourceError if lm-eval is missing, TextError for a task or a file that cannot be read, and as `load`.
    """
    _require_lm_eval()
    options = load_options(device, dtype) | {"mode": mode, "verify": verify}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        local = _write_rows(names, None if data is None else Path(data), Path(folder))
        specs = list(dict.fromkeys(local[name].task if name in local else _lm_eval_name(name) for name in names))
        tasks = _manager(specs, Path(folder), [found.task for found in local.values()])
        results, computed = _run_tasks(model, specs, tasks, limit, batch_size, options | {"adapter": adapter})
        others = None if reference is None else _run_tasks(reference, specs, tasks, limit, batch_size, options)[0]
    return {
        "model": str(model),
        "adapter": None if adapter is None else str(adapter),
        "reference": reference,
        "limit": limit,
        "batch_size": batch_size,
        "tasks": _table(results, others, {found.task: found.sha256 for found in local.values()}, specs),
        "dtype": computed,
        "seconds": round(time.perf_counter() - start, 3),
        "versions": versions() | {name: _version(name) for name in ("lm_eval", "datasets")},
    }


@dataclass(frozen=True)
class _LocalFiles:
    """A task whose local files exist, with their checksums."""

    task: str
    sha256: dict[str, str]


def _write_rows(names: Sequence[str], data: Path | None, folder: Path) -> dict[str, _LocalFiles]:
    """Write rows and a task config, which includes lm-eval's own, into `folder` for every name with local files."""
    if data is None:
        return {}
    if not data.is_dir():
        raise TextError(f"--tasks-data {data}: there is no such folder")
    found = {}
    for name in names:
        local = LOCAL.get(name)
        if local is None or not _file(data, local.files[0]).is_file():
            continue
        paths = [_file(data, file) for file in local.files]
        rows = _read_rows(local, paths)
        (folder / f"{local.task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = {
            "include": str(_task_config(local.task)),
            "task": local.task,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {_SPLIT: str(folder / f"{local.task}.jsonl")},
                "cache_dir": str(folder / "cache"),
            },
            "training_split": None,
            "validation_split": None,
            "test_split": _SPLIT,
        }
        (folder / f"{local.task}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        found[name] = _LocalFiles(
            local.task, {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
        )
    return found


def _file(folder: Path, name: str) -> Path:
    """Return the file of that name, or else one whose name differs only in case."""
    alike = (path for path in sorted(folder.iterdir()) if path.name.lower() == name.lower())
    return folder / name if (folder / name).is_file() else next(alike, folder / name)


def _read_rows(local: _LocalTask, paths: Sequence[Path]) -> Rows:
    """Return the rows of a task. Errors: TextError naming a missing file, or files that the task cannot read."""
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise TextError(f"{path}: cannot be read ({error}); {local.task} needs {', '.join(local.files)}") from None
    try:
        rows = local.rows(*texts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        kind = f"{type(error).__name__}: {error}"
        raise TextError(f"{paths[0]}: is not a file of {local.task} ({kind}); see `reallm eval --help`") from None
    if not rows:
        raise TextError(f"{paths[0]}: is empty")
    return rows


def _lines(text: str) -> Rows:
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _arc(text: str) -> Rows:
    """Convert AI2's files, in which a question is an object, to rows of the hub's data set."""
    rows = []
    for row in _lines(text):
        asked = row["question"]
        choices = {key: [choice[key] for choice in asked["choices"]] for key in ("text", "label")}
        if row["answerKey"] not in choices["label"]:
            raise ValueError(f"answer {row['answerKey']!r} is none of the choices of {row.get('id')}")
        rows.append({"question": asked["stem"], "choices": choices, "answerKey": row["answerKey"]})
    return rows


def _piqa(text: str, labels: str) -> Rows:
    rows, golds = _lines(text), [int(label) for label in labels.split()]
    if len(rows) != len(golds):
        raise ValueError(f"{len(rows)} questions and {len(golds)} labels")
    return [
        {"goal": row["goal"], "sol1": row["sol1"], "sol2": row["sol2"], "label": gold}
        for row, gold in zip(rows, golds, strict=True)
    ]


def _passages(text: str) -> Rows:
    return [{"text": row["text"] + ""} for row in _lines(text)]


_LAMBADA = _LocalTask("lambada_openai", ("lambada_test.jsonl",), _passages)
# Name -> the authors' files that replace the hub's data set.
LOCAL = {
    "arc_easy": _LocalTask("arc_easy", ("ARC-Easy-Test.jsonl",), _arc),
    "arc_challenge": _LocalTask("arc_challenge", ("ARC-Challenge-Test.jsonl",), _arc),
    "piqa": _LocalTask("piqa", ("piqa-valid.jsonl", "piqa-valid-labels.lst"), _piqa),
    "lambada": _LAMBADA,
    "lambada_openai": _LAMBADA,
}


def _lm_eval_name(name: str) -> str:
    """Return lm-eval's name of a task: its `lambada` would be two data sets."""
    return LOCAL[name].task if name in LOCAL else name


def _task_config(task: str) -> Path:
    """Return the path of lm-eval's own config of a task, with prompt and metrics."""
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    found = sorted(folder.rglob(f"{task}.yaml"))
    if not found:
        raise SourceError(f"lm-eval {_version('lm_eval')} has no task {task}; install another version")
    return found[0]


def _manager(specs: Sequence[str], folder: Path, local: Sequence[str]) -> Any:
    """Return lm-eval's task manager; its thousands of own tasks are indexed only if one of them is requested.

    Errors: TextError for a name it does not know.
    """
    from lm_eval.tasks import TaskManager

    with _silence_lm_eval():
        manager = TaskManager(include_path=str(folder), include_defaults=not set(specs) <= set(local))
    for name in specs:
        if name not in manager.all_tasks:
            raise TextError(f"--tasks {name}: lm-eval {_version('lm_eval')} has no such task; see `lm-eval ls tasks`")
    return manager


def _run_tasks(
    path: str, specs: list[str], tasks: Any, limit: int | None, batch_size: int, options: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Return (lm-eval's results, dtype). One model is in memory at a time."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer, loaded = hf.load_tokenizer(path), hf.load(path, **options)
    with _silence_lm_eval():
        scorer = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
        try:
            found = simple_evaluate(
                scorer,
                tasks=specs,
                task_manager=tasks,
                limit=limit,
                bootstrap_iters=_BOOTSTRAP_ITERATIONS,
                log_samples=False,
            )
        except (OSError, ValueError) as error:  # missing data sets raise various types
            if not _is_dataset_error(error):
                raise
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TextError(
                f"--tasks {','.join(specs)}: a data set cannot be loaded ({why}); "
                "give --tasks-data FOLDER with the files, or a connection to the hub"
            ) from error
    return found, str(getattr(loaded, "dtype", "unknown")).removeprefix("torch.")


def _is_dataset_error(error: BaseException) -> bool:
    """Return whether an error was raised by the package datasets, judged by its stack."""
    trace, files = error.__traceback__, []
    while trace is not None:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    return any(f"{os.sep}datasets{os.sep}" in file for file in files)


def _table(
    results: dict[str, Any], others: dict[str, Any] | None, files: dict[str, dict[str, str]], asked: Sequence[str]
) -> Rows:
    """Return one entry per task in the order of the request, then the tasks of groups in lm-eval's order."""
    table = []
    for task, figures in results["results"].items():
        counts = results.get("n-samples", {}).get(task, {})
        if not counts:
            continue  # a group, whose tasks have entries of their own
        config = results.get("configs", {}).get(task, {})
        metrics = _metrics(figures)
        for name, value in _metrics(others["results"][task]).items() if others else ():
            metrics[name] |= {"reference": value["model"], "reference_stderr": value["stderr"]}
        row = {"task": task, "data": files.get(task) or config.get("dataset_path"), "examples": counts["effective"]}
        table.append(row | {"metrics": metrics})
    place = {task: number for number, task in enumerate(asked)}  # lm-eval 0.4.10 sorts by name
    return sorted(table, key=lambda row: place.get(row["task"], len(place)))


def _metrics(figures: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return the metrics by name; lm-eval's keys are `metric,filter`, for instance `acc,none`."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in figures.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = figures.get(f"{name}_stderr,{kind}")
        label = name if kind == "none" else key
        found[label] = {"model": float(value), "stderr": stderr if isinstance(stderr, (int, float)) else None}
    return found


@contextlib.contextmanager
def _silence_lm_eval() -> Iterator[None]:
    """Hide lm-eval's output: bars only on a terminal, nothing on stdout, only errors in the log, no subprocesses."""
    logger = logging.getLogger("lm_eval")
    level, before = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    # Otherwise it would fork this process, with its threads and GPU context, for a bootstrap.
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.ExitStack() as stack:
            devnull = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(devnull))
            if not sys.stderr.isatty():
                stack.enter_context(contextlib.redirect_stderr(devnull))
            yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise SourceError(f"tasks need lm-eval: {install_hint('tasks')}")
