"""What tuning did, in a few lines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from reallm.checkpoint import read_ledger, read_manifest
from reallm.cli.tables.text_table import size
from reallm.tuning import TuneResult


def tuned_text(tuned: TuneResult, before: Path, after: Path) -> str:
    """What trained, what it did to the validation windows, and bits and bytes of both artifacts."""
    trained = ", ".join(f"{count:,} of {word}" for word, count in tuned.counts.items())
    rows = [("trained", trained), ("windows", f"{tuned.training_windows:,}, validated on {tuned.validation_windows}")]
    rows += [("blocks", _blocks(tuned))] if _errors(tuned) else []
    if figures := tuned.end_to_end:
        most = figures.get("top_k")
        rows += [
            (name, f"{figures['before'][key]:.4f} before the first step, {figures['after'][key]:.4f} after")
            for name, key in (("KL" if most is None else "top-k KL", "kl"), ("perplexity", "perplexity"))
            if math.isfinite(figures["before"][key])
        ]
        if most is not None:
            rows += [("", f"of the original's {most} top-k tokens, the rest as one: less than the KL that eval gives")]
        rows += [("steps", f"{figures['steps']:,}, the best after {figures['best_step']:,}")]
        rows += [("stopped", figures["stopped"])] if "stopped" in figures else []
    if not (after / "config.json").is_file():  # an adapter
        nbytes = sum(file.stat().st_size for file in after.rglob("*") if file.is_file())
        return lines([*rows, ("adapter", f"{nbytes:,} bytes beside {read_ledger(before).total_bytes:,}")])
    bits = [read_ledger(folder).bits_per_weight for folder in (before, after)]
    rows += [("bits", f"{bits[0]:.4f} a weight before, {bits[1]:.4f} after"), ("files", files_text(before, after))]
    return lines(rows)


def files_text(before: Path, after: Path) -> str:
    """Bytes of two folders with all their files, and the size that they were made for."""
    nbytes = [read_ledger(folder).total_bytes for folder in (before, after)]
    most = read_manifest(before).size
    made = "" if most is None else f"; made for {most:,}"
    if most is not None and nbytes[1] > most:
        made = f", {nbytes[1] - most:,} beyond the {most:,} that it was made for"
    return f"{nbytes[0]:,} bytes before, {nbytes[1]:,} after{made}"


def lines(rows: list[tuple[str, str]]) -> str:
    """Names and what is said of them, a line each."""
    return "\n".join(f"{name:<11} {value}" for name, value in rows)


def event_line(event: dict[str, Any]) -> str | None:
    """An event as a line; None for those that are not shown."""
    if event["phase"] == "warning":
        return f"warning: {event['text']}"
    if "stopped" in event:
        return f"{event['phase']}: {event['stopped']}, stopped"
    if event["phase"] == "gradients":
        if event["window"] == 0:
            return f"the original's gradients of {event['windows']} windows: {size(event['bytes'])} on disk"
        return f"window {event['window']} of {event['windows']}  {_throughput(event)}"
    if event["phase"] == "block":
        unit = " nats per token" if event["unit"] == "nats" else ""
        error = f"validation error {event['validation']:.5f}{unit}"
        return f"block {event['block']:3d}  round {event['epoch']}  {error}  {_throughput(event)}".rstrip()
    if event["phase"] == "validation":
        name = f"top-{event['top_k']} KL" if "top_k" in event else "KL"
        kl = f"{name} {event['kl']:.4f}  " if math.isfinite(event["kl"]) else ""  # without the original there is none
        return f"step {event['step']:6d}  validation {kl}perplexity {event['perplexity']:.3f}"
    if event["phase"] == "end-to-end":
        return f"step {event['step']:6d} of {event['steps']}  loss {event['loss']:.4f}  {_throughput(event)}"
    return None


def _throughput(event: dict[str, Any]) -> str:
    """Tokens per second and seconds left, as far as the event knows them."""
    words = ((f"{event.get(key, math.nan):,.0f}", unit) for key, unit in _THROUGHPUT_UNITS)
    return "  ".join(f"{number} {unit}" for number, unit in words if number != "nan")


_THROUGHPUT_UNITS = (("tokens_per_second", "tokens/s"), ("eta_seconds", "s left"))


def _errors(tuned: TuneResult) -> dict[int, list[float]]:
    """Validation errors of each block, round by round."""
    found: dict[int, list[float]] = {}
    for event in tuned.events:
        if event["phase"] == "block" and "validation" in event:
            found.setdefault(event["block"], []).append(event["validation"])
    return found


def _blocks(tuned: TuneResult) -> str:
    """The mean over blocks of the error before and of the least one after."""
    errors = _errors(tuned)
    nats = any(event.get("unit") == "nats" for event in tuned.events)
    before, after = (sum(pick(e) for e in errors.values()) / len(errors) for pick in (lambda e: e[0], min))
    what = "error in nats per token" if nats else "relative error"
    return f"{len(errors)} tuned; {what} {before:.5f} before, {after:.5f} after, on average"
