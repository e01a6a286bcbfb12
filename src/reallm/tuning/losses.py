"""Cross-entropy and KL to the original model from hidden states, in chunks of tokens to bound the memory of logits.

Logits of 8 windows of 1,024 tokens with a vocabulary of 49,152 take 1.6 GB in float32, and a loss needs several copies.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reallm.source.decoder_blocks import decoder_of
from reallm.source.devices import module_device
from reallm.tuning.tune_settings import CE, KL

# Logits per chunk: 64 MiB in float32; 128 MiB on a GPU, where small kernels wait for their launch.
CHUNK_VALUES = {"cpu": 1 << 24, "cuda": 1 << 25}

Head = Callable[[Tensor], Tensor]  # hidden states (tokens, hidden) -> logits (tokens, vocabulary)


@dataclass(frozen=True)
class SplitModel:
    """A model as body (ids -> hidden states) and head (hidden states -> logits)."""

    body: Callable[[Tensor], Tensor]
    head: Head
    vocabulary: int


def split_model(model: nn.Module) -> SplitModel:
    """Split the model before its lm_head if logits are lm_head(decoder output); else return an identity head.

    For models that cap or scale their logits the body returns all logits, which takes more memory.
    """
    decoder, head = decoder_of(model), model.get_output_embeddings()
    vocabulary = model.config.get_text_config(decoder=True).vocab_size

    def hidden_states(ids: Tensor) -> Tensor:
        return decoder(input_ids=ids, use_cache=False).last_hidden_state

    def logits(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    if head is not None and decoder is not model:
        device = module_device(model)
        probe = torch.arange(4, device=device)[None] % vocabulary
        with torch.no_grad():
            split, full = head(hidden_states(probe)), logits(probe)
        if split.shape == full.shape and torch.allclose(split.float(), full.float(), rtol=1e-3, atol=1e-4):
            return SplitModel(hidden_states, head, vocabulary)
    return SplitModel(logits, lambda states: states, vocabulary)


@dataclass(frozen=True)
class Teacher:
    """Teacher outputs for some tokens: hidden states with the lm_head, or top-k tokens with log-probabilities."""

    head: Head | None = None
    states: Float[Tensor, "tokens hidden"] | None = None
    token_ids: Int[Tensor, "tokens k"] | None = None
    log_probs: Float[Tensor, "tokens k"] | None = None

    def divergence(self, log_probs: Float[Tensor, "n vocab"], rows: slice) -> Float[Tensor, " n"]:
        """Return KL(original ‖ model) per token; with top-k, all other tokens count as one."""
        if self.token_ids is None:
            assert self.head is not None and self.states is not None
            teacher = self.head(self.states[rows]).float().log_softmax(-1)
            return (teacher.exp() * (teacher - log_probs)).sum(-1)
        assert self.log_probs is not None
        teacher = self.log_probs[rows].float()
        student = log_probs.gather(-1, self.token_ids[rows].long())
        return (teacher.exp() * (teacher - student)).sum(-1) + _residual_mass_kl(teacher, student)


def top_k_log_probs(logits: Float[Tensor, "n vocab"], k: int) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Return the top-k tokens (int32) and their log-probabilities (float16), the dtypes stored on disk."""
    values, token_ids = logits.float().log_softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    return token_ids.to(torch.int32), values.to(torch.float16)


def loss_sums(
    head: Head,
    states: Float[Tensor, "tokens hidden"],
    targets: Int[Tensor, " tokens"],
    teacher: Teacher | None,
    loss: str,
    vocabulary: int,
) -> tuple[Float[Tensor, ""], Float[Tensor, "2"]]:
    """Return (sum of the loss, differentiable; sums of KL (nan without teacher) and cross-entropy), in nats.

    Logits are computed in chunks, and again in the backward pass.
    """

    def chunk_loss(hidden_states: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        log_probs = head(hidden_states).float().log_softmax(-1)
        ce = -log_probs.gather(-1, targets[rows, None])[:, 0].sum()
        kl = ce.new_full((), torch.nan) if teacher is None else teacher.divergence(log_probs, rows).sum()
        chosen = {CE: ce, KL: kl}.get(loss, (ce + kl) / 2)
        return chosen, torch.stack([kl.detach(), ce.detach()])

    total = states.new_zeros((), dtype=torch.float32)
    measured = states.new_zeros(2, dtype=torch.float64)
    values = CHUNK_VALUES.get(states.device.type, CHUNK_VALUES["cpu"])
    for rows in _slices(len(states), max(1, values // vocabulary)):
        chunk_total, sums = checkpoint(chunk_loss, states[rows], rows, use_reentrant=False, preserve_rng_state=False)
        total, measured = total + chunk_total, measured + sums
    return total, measured


@contextlib.contextmanager
def autocast_to_dtype(device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """Autocast matrix products to `dtype`; float32 means no autocast."""
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        yield


@contextlib.contextmanager
def deterministic_kernels(device: torch.device | str) -> Iterator[None]:
    """Use deterministic GPU kernels where torch has them: the attention backward has a nondeterministic one.

    CPU kernels are deterministic already. Filling uninitialized memory, the default of that mode, is switched off; the
    cuBLAS workspace is set because torch otherwise warns at every matrix product.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    filling = torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            torch.use_deterministic_algorithms(True, warn_only=True)
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filling


def _residual_mass_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the KL term of the residual mass, all tokens outside the top k taken as one."""
    p, q = ((1 - log_probs.exp().sum(-1)).clamp(min=1e-6) for log_probs in (teacher, student))
    return p * (p.log() - q.log())


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, length, step))
