"""Summary and progress lines of tuning."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from reallm.checkpoint import read_ledger, read_manifest
from reallm.cli.tables.text_table import size
from reallm.tuning import TuneResult


def tuned_text(result: TuneResult, before: Path, after: Path) -> str:
    """Return what trained, the validation figures before and after, and bits and bytes of both artifacts."""
    trained = ", ".join(f"{count:,} of {group}" for group, count in result.counts.items())
    rows = [("trained", trained), ("windows", f"{result.training_windows:,}, validated on {result.validation_windows}")]
    rows += [("blocks", _blocks(result))] if _errors(result) else []
    if figures := result.end_to_end:
        top_k = figures.get("top_k")
        rows += [
            (name, f"{figures['before'][key]:.4f} before the first step, {figures['after'][key]:.4f} after")
            for name, key in (("KL" if top_k is None else "top-k KL", "kl"), ("perplexity", "perplexity"))
            if math.isfinite(figures["before"][key])
        ]
        if top_k is not None:
            rows += [
                ("", f"over the teacher's top {top_k} tokens, all others as one: lower than the KL that eval measures")
            ]
        rows += [("steps", f"{figures['steps']:,}, the best after {figures['best_step']:,}")]
        rows += [("stopped", figures["stopped"])] if "stopped" in figures else []
    if not (after / "config.json").is_file():  # an adapter
        nbytes = sum(file.stat().st_size for file in after.rglob("*") if file.is_file())
        return lines([*rows, ("adapter", f"{nbytes:,} bytes in addition to {read_ledger(before).total_bytes:,}")])
    bits = [read_ledger(folder).bits_per_weight for folder in (before, after)]
    rows += [("bits", f"{bits[0]:.4f} per weight before, {bits[1]:.4f} after"), ("files", files_text(before, after))]
    return lines(rows)


def files_text(before: Path, after: Path) -> str:
    """Return the bytes of all files in two artifacts, and the size limit of the first."""
    nbytes = [read_ledger(folder).total_bytes for folder in (before, after)]
    limit = read_manifest(before).size
    note = "" if limit is None else f"; size limit {limit:,}"
    if limit is not None and nbytes[1] > limit:
        note = f", {nbytes[1] - limit:,} over the size limit of {limit:,}"
    return f"{nbytes[0]:,} bytes before, {nbytes[1]:,} after{note}"


def lines(rows: list[tuple[str, str]]) -> str:
    """Format (name, value) rows, one line each."""
    return "\n".join(f"{name:<11} {value}" for name, value in rows)


def event_line(event: dict[str, Any]) -> str | None:
    """Format an event as a line; None for events that are not shown."""
    if event["phase"] == "warning":
        return f"warning: {event['text']}"
    if "stopped" in event:
        return f"{event['phase']}: {event['stopped']}, stopped"
    if event["phase"] == "gradients":
        if event["window"] == 0:
            return f"gradients of the original model for {event['windows']} windows: {size(event['bytes'])} on disk"
        return f"window {event['window']} of {event['windows']}  {_throughput(event)}"
    if event["phase"] == "block":
        unit = " nats per token" if event["unit"] == "nats" else ""
        error = f"validation error {event['validation']:.5f}{unit}"
        return f"block {event['block']:3d}  epoch {event['epoch']}  {error}  {_throughput(event)}".rstrip()
    if event["phase"] == "validation":
        name = f"top-{event['top_k']} KL" if "top_k" in event else "KL"
        kl = f"{name} {event['kl']:.4f}  " if math.isfinite(event["kl"]) else ""  # there is no KL without a teacher
        return f"step {event['step']:6d}  validation {kl}perplexity {event['perplexity']:.3f}"
    if event["phase"] == "end-to-end":
        return f"step {event['step']:6d} of {event['steps']}  loss {event['loss']:.4f}  {_throughput(event)}"
    return None


def _throughput(event: dict[str, Any]) -> str:
    """Return tokens per second and remaining seconds, if the event has them."""
    rates = ((f"{event.get(key, math.nan):,.0f}", unit) for key, unit in _THROUGHPUT_UNITS)
    return "  ".join(f"{number} {unit}" for number, unit in rates if number != "nan")


_THROUGHPUT_UNITS = (("tokens_per_second", "tokens/s"), ("eta_seconds", "s left"))


def _errors(result: TuneResult) -> dict[int, list[float]]:
    """Return the validation errors of each block by epoch."""
    found: dict[int, list[float]] = {}
    for event in result.events:
        if event["phase"] == "block" and "validation" in event:
            found.setdefault(event["block"], []).append(event["validation"])
    return found


def _blocks(result: TuneResult) -> str:
    """Return the mean over blocks of the initial and the lowest validation error."""
    errors = _errors(result)
    nats = any(event.get("unit") == "nats" for event in result.events)
    before, after = (sum(pick(e) for e in errors.values()) / len(errors) for pick in (lambda e: e[0], min))
    metric = "error in nats per token" if nats else "relative error"
    return f"{len(errors)} tuned; {metric} {before:.5f} before, {after:.5f} after, on average"
