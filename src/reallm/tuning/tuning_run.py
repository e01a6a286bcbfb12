"""`reallm tune`: fine-tune an artifact and write it again at the same size."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import reallm
from reallm.calibrate.text import text_sha256
from reallm.checkpoint import STAGING, check_output, open_work_folder, read_manifest, remove_work_folder, work_folder
from reallm.checkpoint.headers import read_headers, weight_files
from reallm.errors import ArtifactError, ReallmError, RecipeError, SourceError
from reallm.hf import DECODE_PER_USE, load, load_tokenizer
from reallm.kernels import set_mmap_threshold
from reallm.source import Source, meta_model, open_source, silence_transformers, walk
from reallm.tuning.adapter_merge import Factors, read_adapter, save_adapter
from reallm.tuning.artifact_update import check_size, write_tuned
from reallm.tuning.blockwise import tune_blocks
from reallm.tuning.data import Windows, load_windows, split_windows
from reallm.tuning.distributed import ProcessGroup, init_process_group
from reallm.tuning.end_to_end import STEP_FILE, TrainingRun, tune_end_to_end
from reallm.tuning.log import Listener, Log
from reallm.tuning.losses import deterministic_kernels
from reallm.tuning.trainables import Trainables, choose, choose_new_residuals
from reallm.tuning.tune_settings import Settings, check_settings

# Settings that the provenance note omits: stored elsewhere in it, or without effect on the result.
_NOT_NOTED = ("text", "method", "validation", "validate_every", "reference", "adapter", "tokens", "device")
_NOT_NOTED += ("micro_batch", "save_memory", "checkpointing")
_DIGITS = 16  # of sha256 in a note: short, as the note counts as stored bytes and only distinguishes texts and models

# Settings compared by content, or stored under keys of their own, in the state of an interrupted run.
_STORED_APART = ("text", "validation", "reference", "device", "seed")


@dataclass(frozen=True)
class TuneResult:
    """Result of a tuning run: trained values per parameter group, and figures on the validation windows."""

    counts: dict[str, int]
    training_windows: int
    validation_windows: int
    end_to_end: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    is_main_process: bool = True  # whether this process writes files and prints


def tune(
    artifact: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    log: str | Path | None = None,
    listener: Listener | None = None,
    **settings: Any,
) -> TuneResult:
    """Tune an artifact and write it to the folder `out`, which appears by one rename.

    With `adapter`, a rank, `out` is an adapter for the artifact, which stays unchanged (see `adapter_merge.py`).
    Keywords as in `Settings`. `log` is a file for events as JSON lines; `listener` is called with each event. With
    `resume` an interrupted run continues from the last finished block or saved step, to the same bytes. Under torchrun,
    all processes share the work; the main process writes.
    Errors: RecipeError, TextError, SourceError or ArtifactError, before anything is written.
    """
    for name in ("text", "validation", "train"):
        if isinstance(settings.get(name), (str, Path)):
            settings[name] = (settings[name],)
    return run(Path(artifact), Path(out), Settings(**settings), resume, Path(log) if log else None, listener)


def run(
    artifact: Path,
    out: Path,
    settings: Settings,
    resume: bool = False,
    log: Path | None = None,
    listener: Listener | None = None,
) -> TuneResult:
    """Run `tune` with a `Settings` object."""
    check_settings(settings)
    set_mmap_threshold()
    with init_process_group(settings.device) as (workers, device):
        settings = dataclasses.replace(settings, device=device)
        workers.check_batch("--batch", settings.batch)
        if settings.adapter is None:
            check_size(artifact, settings.train)
        if workers.is_main_process:
            check_output(out, resume, read_manifest if settings.adapter is None else read_adapter)
            # A run killed after the rename leaves both folders: then only the work folder needs removing.
            if out.exists() and not work_folder(out).exists():
                raise ArtifactError(f"{out} exists; give another --output or remove it")
        workers.barrier()
        log = Log(log, listener) if workers.is_main_process else Log()
        return _Run(artifact, out, settings, workers, log).execute()


@dataclass(frozen=True)
class _Run:
    artifact: Path
    out: Path
    settings: Settings
    workers: ProcessGroup
    log: Log

    def execute(self) -> TuneResult:
        training, validation = self._windows()
        trainables = self._trainables()
        self._check_original(trainables.model)
        self._warn_different_source()
        work, finished = work_folder(self.out), self.out.exists()
        figures: dict[str, Any] = {}
        with open_work_folder(work, self._state()) if self.workers.is_main_process else contextlib.nullcontext():
            self.workers.barrier()
            if not finished:
                self.log.add(phase="begin", trained=trainables.counts, windows=len(training), checked=len(validation))
                with deterministic_kernels(self.settings.device):
                    figures = self._train(trainables, training, validation, work)
            if self.workers.is_main_process:
                if not finished:
                    self._write(trainables, figures, work)
                remove_work_folder(work)
        self.workers.barrier()
        return TuneResult(
            trainables.counts, len(training), len(validation), figures, self.log.events, self.workers.is_main_process
        )

    def _train(self, trainables: Trainables, training: Windows, validation: Windows, work: Path) -> dict[str, Any]:
        """Tune block-wise, then end to end, as `method` says; return the figures of the latter."""
        # A saved end-to-end state includes the result of block-wise tuning.
        if self.settings.block_wise and not (work / STEP_FILE).is_file():
            assert self._source is not None
            blocks = training[: self._whole_batches(len(training))]
            with trainables.freeze_shared_decoders():
                tune_blocks(self._source, trainables, blocks, validation, self.settings, work, self.workers, self.log)
        if not self.settings.end_to_end:
            return {}
        original = None if self._source is None else self._original
        return tune_end_to_end(
            TrainingRun(trainables, original, training, validation, self.settings, work, self.workers, self.log)
        )

    def _windows(self) -> tuple[Windows, Windows]:
        """Return (training, validation) windows; validation comes from its own files or is held out from the text."""
        settings, tokenizer = self.settings, self._tokenizer
        windows = load_windows(settings.text, tokenizer, settings.context)
        if settings.validation:
            validation = load_windows(settings.validation, tokenizer, settings.context, "--validation")
            return windows, validation[: settings.validation_windows]
        return split_windows(windows, settings.validation_windows, settings.seed)

    def _whole_batches(self, windows: int) -> int:
        """Return the number of windows for block-wise tuning: whole batches, so that all shards are equal."""
        count = min(windows, self.settings.block_windows) // self.settings.batch * self.settings.batch
        if count == 0:
            raise RecipeError(
                f"--batch {self.settings.batch}: the text has {windows} windows to train on, --block-windows is "
                f"{self.settings.block_windows}; use a smaller --batch"
            )
        return count

    def _trainables(self) -> Trainables:
        settings = self.settings
        model = load(self.artifact, DECODE_PER_USE, dtype=torch.float32)
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit is not None and settings.context > limit:
            raise RecipeError(f"--context {settings.context} is longer than the {limit} positions of this model")
        with silence_transformers():
            walked = walk(meta_model(model.config))
        how: dict[str, Any] = {"device": settings.device}
        how["constant_dtype"] = None if settings.save_memory else settings.compute_dtype
        if settings.adapter is not None:
            return choose_new_residuals(model, walked, settings.adapter, settings.seed, **how)
        headers = read_headers(weight_files(self.artifact, ArtifactError), ArtifactError)
        how["blocks_only"] = not settings.end_to_end
        chosen = choose(model, walked, {name: h.dtype for name, h in headers.items()}, settings.train, **how)
        if chosen.shared_decoders and not settings.end_to_end:
            raise RecipeError(
                f"--train decoders: shared decoders ({', '.join(chosen.shared_decoders)}) belong to many blocks and "
                "train end to end; use --method both or end-to-end, or remove decoders"
            )
        return chosen

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.artifact)

    @functools.cached_property
    def _source(self) -> Source | None:
        return None if self.settings.reference is None else open_source(self.settings.reference)

    def _check_original(self, compressed: nn.Module) -> None:
        if self._source is None:
            return
        sizes = [c.get_text_config(decoder=True).vocab_size for c in (self._source.config, compressed.config)]
        if sizes[0] != sizes[1]:
            raise SourceError(
                f"--reference {self.settings.reference}: its vocabulary has {sizes[0]} tokens, the artifact's "
                f"{sizes[1]}; predictions can be compared only over the same vocabulary"
            )
        try:
            reference_tokenizer = load_tokenizer(str(self.settings.reference))
        except ReallmError:
            return  # the original model may lack a tokenizer
        # Equal sizes prove nothing: many vocabularies have 32,000 tokens.
        if reference_tokenizer.get_vocab() != self._tokenizer.get_vocab():
            raise SourceError(
                f"--reference {self.settings.reference}: its tokenizer differs from the artifact's; "
                "predictions can be compared only over the same vocabulary"
            )

    def _warn_different_source(self) -> None:
        """Log a warning if the reference is not the source model of the artifact: a mistake, or another teacher."""
        source_sha256 = read_manifest(self.artifact).provenance.get("source_sha256")
        if isinstance(source_sha256, str) and self._original_sha256 not in (None, source_sha256):
            self.log.add(
                phase="warning",
                text=f"--reference {self.settings.reference} is not the source model of {self.artifact} (sha256 of the "
                f"weights {self._original_sha256:.12}… and {source_sha256:.12}…): it is used as the teacher anyway",
            )

    def _original(self) -> nn.Module:
        """Return the original model on the CPU, frozen, in the compute dtype."""
        assert self._source is not None
        original = self._source.load(torch.float32, "cpu").eval().requires_grad_(False)
        _cast_parameters(original, self.settings.compute_dtype)
        return original

    @functools.cached_property
    def _original_sha256(self) -> str | None:
        return None if self._source is None else self._source.fingerprint()

    def _state(self) -> dict[str, Any]:
        """Return everything that must not change between an interrupted run and `resume`."""
        settings = self.settings
        chosen = {k: v for k, v in dataclasses.asdict(settings).items() if k not in _STORED_APART}
        texts = {kind: [text_sha256(f) for f in getattr(settings, kind)] for kind in ("text", "validation")}
        chosen |= {"processes": self.workers.count, "train": list(settings.train), "reference": self._original_sha256}
        return {
            "source": files_sha256(weight_files(self.artifact, ArtifactError)),
            "seed": settings.seed,
            "device": torch.device(settings.device).type,
            "calibration": {"tuning": chosen, **texts},
            "plan": {},
        }

    def _write(self, trainables: Trainables, figures: dict[str, Any], work: Path) -> None:
        staging = work / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        tensors = {name: tensor.cpu() for name, tensor in trainables.export_tensors().items()}
        if self.settings.adapter is None:
            write_tuned(self.artifact, staging, tensors, self._note(figures))
        else:
            pairs = {path: Factors(tensors[f"{path}.left"], tensors[f"{path}.right"]) for path in trainables.matrices}
            original = read_manifest(self.artifact).provenance.get("source_sha256")
            save_adapter(pairs, staging, self.artifact.name, original)
        os.rename(staging, self.out)

    def _note(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Return the provenance note of this run, most important entries first; no times and no paths.

        Defaults, and values that the provenance of the compression already has, are omitted to keep it short.
        """
        settings, provenance = self.settings, read_manifest(self.artifact).provenance
        always_noted = [*(["loss"] if settings.end_to_end else []), *(["block_error"] if settings.block_wise else [])]
        defaults = {field.name: field.default for field in dataclasses.fields(settings)}
        chosen = {
            name: ",".join(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(settings).items()
            if name not in _NOT_NOTED and (value != defaults[name] or name in always_noted)
        }
        here = {"device": torch.device(settings.device).type, "torch": torch.__version__, "reallm": reallm.__version__}
        original = self._original_sha256
        if original not in (None, provenance.get("source_sha256")):
            here["original_sha256"] = original[:_DIGITS]
        return {
            "text": ",".join(text_sha256(file)[:_DIGITS] for file in settings.text),
            "method": settings.method,
            **{key: figures[key] for key in ("steps", "best_step", "stopped") if key in figures},
            **chosen,
            **{key: value for key, value in here.items() if value != provenance.get(key)},
        }


def files_sha256(files: list[Path]) -> str:
    """Return the sha256 (hex) over names and contents of the files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 23):
                digest.update(chunk)
    return digest.hexdigest()


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters to `dtype`; buffers such as rotary frequencies keep theirs: 16 bits are too coarse."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
