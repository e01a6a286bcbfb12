"""Plan and cost of a job, printed before any work."""

from __future__ import annotations

from collections import defaultdict

from reallm.cli.tables.names import model_name, short_name
from reallm.cli.tables.text_table import duration, size, table, unused_lines
from reallm.pipeline import Job, analysis_seconds, estimate


def plan_table(job: Job) -> str:
    """Return the plan, one line per role, shape and format, then unquantized and unused tensors."""
    groups: dict[tuple[str, tuple[int, int], str], list[int]] = defaultdict(list)
    for matrix, planned in job.compressed_matrices:
        groups[matrix.role, matrix.shape, short_name(planned.fmt)].append(planned.nbytes)
    roles = list(dict.fromkeys(role for role, _, _ in groups))  # rows of a role together, in model order
    rows = [
        (role, fmt, len(sizes), f"{shape[0]}×{shape[1]}", f"{sum(sizes):,}", f"{_bits(sizes, shape):.3f}")
        for (role, shape, fmt), sizes in sorted(groups.items(), key=lambda group: roles.index(group[0][0]))
    ]
    text = table(("role", "format", "matrices", "shape", "bytes", "bits/weight"), rows, left=2)
    unquantized = defaultdict(int)
    for reason in job.unquantized_tensors.values():
        unquantized[reason] += 1
    lines = [f"unquantized: {count} tensors ({reason})" for reason, count in unquantized.items()]
    lines += [f"tied, stored once: {head} is the embedding" for head in job.walk.tied_heads]
    lines += unused_lines([one.to_dict() for one in job.source.unused])
    return "\n".join([text, *lines])


def cost_table(job: Job) -> str:
    """Return the exact bytes of tensors and the estimated time, memory and disk space."""
    cost = estimate(job)
    stored = cost.compressed_bytes + cost.unquantized_bytes
    rows = [
        *_budget_rows(job),
        *([("calibration", calibration_line(job))] if job.settings.calibration else []),
        ("bits per block weight", f"{cost.bits_per_weight:.4f}"),
        ("compressed tensors", f"{cost.compressed_bytes:,} bytes"),
        ("unquantized tensors", f"{cost.unquantized_bytes:,} bytes"),
        ("all tensors", f"{size(stored)} ({_compare_sizes(stored, job.source.nbytes)} of {model_name(job.source)})"),
        (
            "time",
            f"about {duration(max(cost.seconds, 1.0))} on {job.settings.device} (from samples; longer if busy)",
        ),
        ("peak memory", f"about {size(cost.peak_memory_bytes)}{_full_load_note(job)}"),
        ("disk while running", f"about {size(cost.disk_bytes)}"),
    ]
    return "\n".join(f"{name:<22} {value}" for name, value in rows)


def analysis_line(job: Job) -> str | None:
    """Return a note that losses are not measured yet, with the time it takes; None if no analysis will run."""
    if job.forecast is None or not job.forecast.to_analyse:
        return None
    return (
        "predicted from typical sensitivities of each role; the run measures them first: about "
        f"{duration(max(analysis_seconds(job), 1.0))}. Its plan may differ from this one"
    )


def calibration_line(job: Job, requested: int | None = None) -> str:
    """Return the number of calibration windows, with a note if the text has fewer than `requested`."""
    windows, context = job.settings.calibration_windows, job.settings.calibration_context
    shortage = (
        "" if requested is None or windows >= requested else f": the text has no more, {requested:,} were requested"
    )
    return f"{windows:,} windows of {context:,} tokens{shortage}"


def _full_load_note(job: Job) -> str:
    reason = job.source.full_load_reason
    return "" if reason is None else f"; {model_name(job.source)} is read as a whole: {reason}"


def _compare_sizes(stored: int, original: int) -> str:
    """Return how much smaller or larger all tensors are than the original model's."""
    times, word = (original / stored, "smaller") if stored <= original else (stored / original, "larger")
    # Below a factor of 1.05 a single decimal is too coarse.
    text = f"{times:.1f} times {word} than" if times >= 1.05 else f"{100 * (times - 1):.1f} % {word} than"
    return f"{text if stored != original else 'as large as'} the {size(original)}"


def budget_table(job: Job) -> str:
    """Return the predicted loss and bytes of a budget's plan."""
    rows = [*_budget_rows(job), ("bits per block weight", f"{job.plan.block_bits:.4f}")]
    return "\n".join(f"{name:<22} {value}" for name, value in rows)


def _budget_rows(job: Job) -> list[tuple[str, str]]:
    if job.forecast is None:
        return []
    source = "" if job.forecast.calibrated else " (typical sensitivities)"
    rows = [("predicted loss", f"{job.forecast.loss:.4f} nats per token{source}")]
    if job.forecast.nbytes is not None:
        nbytes, most = job.forecast.nbytes, job.forecast.size or 1
        text = f"about {nbytes:,} bytes, {100 * nbytes / most:.2f} % of {most:,}"
        rows.append(("all files", text + _excess_note(job, nbytes - most)))
    return rows


def _excess_note(job: Job, excess: int) -> str:
    if excess <= 0:
        return ""
    return (
        f": {excess:,} too many; if the measured size exceeds the limit too, a few of {len(job.compressed_matrices)} "
        "matrices get smaller formats"
    )


def _bits(sizes: list[int], shape: tuple[int, int]) -> float:
    return 8 * sum(sizes) / (len(sizes) * shape[0] * shape[1])
