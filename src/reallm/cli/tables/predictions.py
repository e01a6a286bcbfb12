"""Predicted and measured loss of a plan, and plans as files and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reallm.allocate import MatrixInfo
from reallm.allocate.format_plan import PER_LAYER
from reallm.allocate.options import find_option
from reallm.allocate.recipe import KEEP
from reallm.calibrate.text import leading_bos, load_text, tokenize
from reallm.calibrate.windows import SELF, generate_windows
from reallm.evaluate.perplexity import evaluate
from reallm.hf import load, load_tokenizer
from reallm.pipeline import Job
from reallm.pipeline.job import matrix_info
from reallm.source import Matrix

_WINDOWS = 4


def loss_line(job: Job, folder: Path, windows: int = _WINDOWS) -> str:
    """Return a line with predicted and measured KL, on windows after those of the calibration if there are any."""
    found = measure_loss(job, folder, windows)
    held_out = "held out" if found["held_out"] else "from the calibration: the text has no more"
    assert job.forecast is not None
    return (
        f"{'loss (KL)':<22} predicted {job.forecast.loss:.4f}, realised {found['kl']:.4f} nats per token "
        f"({found['windows']} windows, {held_out})"
    )


def measure_loss(job: Job, folder: Path, windows: int = _WINDOWS) -> dict[str, Any]:
    """Return KL to the original model (nats per token) and perplexity on held-out windows of the calibration text."""
    settings = job.settings
    device = torch.device(settings.device)
    original = load(job.source.label, device=None if device.type == "cpu" else device)
    ids, context, held_out = _tokens(job, original, windows)
    compressed = load(folder, device=None if device.type == "cpu" else device)
    bos = leading_bos(load_tokenizer(job.source.label))
    found = evaluate(compressed, ids, context, bos=bos, max_windows=windows, reference=original)
    return {"kl": found.kl, "perplexity": found.perplexity, "windows": found.windows, "held_out": held_out}


def _tokens(job: Job, model: torch.nn.Module, windows: int) -> tuple[torch.Tensor, int, bool]:
    """Return (tokens, context, whether the tokens are held out from the calibration)."""
    settings, tokenizer = job.settings, load_tokenizer(job.source.label)
    limit = getattr(job.source.config.get_text_config(decoder=True), "max_position_embeddings", None)
    context = min(settings.calibration_context, limit or settings.calibration_context)
    if settings.calibration == (SELF,):
        context = min(context, 512)
        generated = generate_windows(model, tokenizer, windows, context, settings.seed + 1, settings.device)
        body = generated if leading_bos(tokenizer) is None else generated[:, 1:]
        return body.reshape(-1), context, True
    ids = tokenize(tokenizer, [document for path in settings.calibration for document in load_text(path)])
    body = context - (leading_bos(tokenizer) is not None)
    held_out = ids[settings.calibration_windows * body :]
    return (held_out, context, True) if len(held_out) >= body else (ids, context, False)


def plan_file(job: Job) -> str:
    """Return the plan as an editable recipe: one rule per matrix, commented with predicted bytes and loss."""
    entries = {entry.matrix.name: entry for entry in job.plan.entries}
    lines = [*_head(job), "", "rules:"]
    for matrix in (matrix_info(matrix) for matrix in job.walk.matrices if _has_rule(matrix)):
        entry = entries.get(matrix.name)
        spec = KEEP if entry is None else _flow(entry.fmt)
        lines.append(f"- {{match: {json.dumps(matrix.name)}, format: {spec}}}{_comment(job, matrix)}")
    for kind in ("embedding", "head"):
        named = [matrix_info(m) for m in job.walk.matrices if m.kind == kind and not _has_rule(m)]
        if named:
            entry = entries.get(named[0].name)
            lines.append(f"{kind}: {KEEP if entry is None else _flow(entry.fmt)}{_comment(job, named[0])}")
    if job.coding:
        lines.append("coding: true")
    if job.objective is not None:
        lines.append(f"objective: {job.objective}")
    return "\n".join(lines) + "\n"


def _has_rule(matrix: Matrix) -> bool:
    """Return whether the matrix needs a rule; embedding and lm_head have keys of their own."""
    return matrix.kind == "block" or matrix.role == PER_LAYER


def _head(job: Job) -> list[str]:
    lines = [f"name: {json.dumps(job.plan.recipe)}"]
    if job.forecast is not None:
        kind = "from the end-to-end loss of this model" if job.forecast.calibrated else "from typical sensitivities"
        lines.insert(0, f"# predicted loss {job.forecast.loss:.5f} nats per token, {kind}")
        if job.forecast.nbytes is not None:
            lines.insert(0, f"# about {job.forecast.nbytes:,} bytes of {job.forecast.size:,}, all files")
    return lines


def _comment(job: Job, matrix: MatrixInfo) -> str:
    entry = next((entry for entry in job.plan.entries if entry.matrix.name == matrix.name), None)
    if entry is None or job.forecast is None:
        return ""
    option = find_option(entry, job.forecast.options)
    return f"  # {option.nbytes:,} bytes, {8 * option.nbytes / matrix.weights:.3f} bits, loss {option.loss:.3g}"


def _flow(fmt: Any) -> str:
    from reallm.formats import to_spec

    return json.dumps(to_spec(fmt))


def plan_rows(job: Job) -> list[dict[str, Any]]:
    """Return format, bytes and predicted loss of every matrix as JSON values."""
    from reallm.formats import to_spec

    assert job.forecast is not None
    found = []
    for entry in job.plan.entries:
        option = find_option(entry, job.forecast.options)
        row = {"matrix": entry.matrix.name, "format": to_spec(entry.fmt), "nbytes": option.nbytes, "loss": option.loss}
        found.append(row)
    return found


def frontier(jobs: Sequence[Job]) -> dict[str, Any]:
    """Return bytes, bits per weight, predicted loss and plan for several budgets."""
    points = [
        {
            "size": job.forecast.size,
            "nbytes": job.forecast.nbytes,
            "bits_per_weight": job.plan.block_bits,
            "loss": job.forecast.loss,
            "calibrated": job.forecast.calibrated,
            "plan": plan_rows(job),
        }
        for job in jobs
        if job.forecast is not None
    ]
    return {"model": Path(jobs[0].source.label).name, "points": points}


def plot_frontier(points: dict[str, Any], path: Path) -> bool:
    """Plot bytes against predicted loss; return False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        return False
    rows = sorted(points["points"], key=lambda row: row["nbytes"])
    unit, name = (1e6, "MB") if rows[-1]["nbytes"] >= 1e6 else (1e3, "KB")
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["nbytes"] / unit for row in rows], [row["loss"] for row in rows], "o-", markersize=4)
    for row in rows:
        # The line falls: labels fit above to the right, and the last one below to the left, inside the frame.
        place, side = ((5, 4), "left") if row is not rows[-1] else ((-5, -11), "right")
        axes.annotate(
            f"{row['loss']:.2g}, {row['bits_per_weight']:.2f} bits", (row["nbytes"] / unit, row["loss"]),
            xytext=place, ha=side, textcoords="offset points", fontsize=8,
        )  # fmt: skip
    axes.set(xlabel=f"all files, {name}", ylabel="predicted KL, nats per token", yscale="log", title=points["model"])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.margins(y=0.1)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    return True
