"""Hidden-state cache: run calibration windows through a model, one decoder block at a time.

The cache holds the hidden states of all windows before the current block. The second moments of the inputs of its
matrices are computed there; then the block, compressed by then, computes the states before the next. So every block
is calibrated on the inputs that it gets in the compressed model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reallm.calibrate import block_arguments
from reallm.calibrate.block_arguments import BlockCalls
from reallm.calibrate.block_loader import BlockLoader, init_empty_model
from reallm.errors import SourceError
from reallm.source.decoder_blocks import decoder_blocks, decoder_of
from reallm.source.devices import module_device
from reallm.source.transformers_logging import silence_transformers
from reallm.source.walk import Matrix, linear_shape

# Tokens per forward pass: 8,192 of hidden size 4,096 are 128 MB in float32, and make matrix products large.
TOKENS_PER_PASS = 8192


@dataclass
class SecondMoments:
    """Second moments XᵀX / n_tokens of the inputs of modules; modules with the same input tensor share one sum."""

    leaders: dict[str, str] = field(default_factory=dict)  # module path -> path of the module whose sum it uses
    sums: dict[str, Float[Tensor, "in in"]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def get(self, name: str) -> Float[Tensor, "in in"] | None:
        """Return XᵀX / n_tokens in float32; None for a module that no calibration token is_reached."""
        leader = self.leaders.get(name)
        if leader is None or not self.tokens[leader]:
            return None
        return self.sums[leader] / self.tokens[leader]

    def pop(self, name: str) -> Float[Tensor, "in in"] | None:
        """Return `get(name)` and remove the module; a sum that no other module uses is divided in place, not copied."""
        found = None
        if (leader := self.leaders.pop(name, None)) is not None and self.tokens[leader]:
            last = leader not in self.leaders.values()
            total = self.sums.pop(leader) if last else self.sums[leader]
            found = total.div_(self.tokens[leader]) if last else total / self.tokens[leader]
        return found

    def add(
        self,
        name: str,
        inputs: Float[Tensor, "*tokens in"],
        leader_inputs: dict[str, Tensor],
        weights: Float[Tensor, "windows context"] | None = None,
    ) -> None:
        """Add the inputs of one forward pass. `leader_inputs`: the input tensors of this pass's leaders.

        With `weights`, one per token, a module gets a sum of its own.
        """
        twin = next((leader for leader, tensor in leader_inputs.items() if tensor is inputs), None)
        if self.leaders.setdefault(name, twin or name) != name:
            return
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if weights is None:
            leader_inputs[name] = inputs
        else:
            rows = rows * weights.reshape(-1, 1).to(rows).sqrt()
        if name not in self.sums:
            self.sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            self.tokens[name] = 0
        self.sums[name].addmm_(rows.T, rows)
        self.tokens[name] += len(rows)


def nbytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes per token of a hidden-state cache of a model, predicted from its config without weights.

    If only a real run can tell, it is one row of hidden states.
    """
    text = config.get_text_config(decoder=True)
    with silence_transformers():
        model = init_empty_model(config, dtype).eval()
    found = block_arguments.nbytes_per_token(model, decoder_of(model), decoder_blocks(model))
    return text.hidden_size * dtype.itemsize if found is None else found


class HiddenStateCache:
    """The hidden states of token windows before one block of a dense model, whose weights the caller replaces."""

    def __init__(
        self,
        model: nn.Module,
        windows: Int[Tensor, "windows context"],
        device: str | torch.device,
        batch: int | None = None,
        block_loader: BlockLoader | None = None,
    ) -> None:
        """Compute the hidden states before the first block. The model may be on the CPU; only one block is on `device`.

        `batch` windows are processed at once, by default as many as have 8,192 tokens. With a `block_loader`, blocks
        are loaded here one at a time; after that the caller has to load the current block.
        Errors: SourceError for a model without a list of decoder blocks, or whose blocks cannot be run one by one.
        """
        self.model, self.device, self._block_loader = model, torch.device(device), block_loader
        self.batches = list(windows.split(batch or max(1, TOKENS_PER_PASS // windows.shape[1])))
        self.blocks = decoder_blocks(model)
        self.position = 0
        with torch.no_grad(), _full_precision(self.device):
            self._calls = BlockCalls(model, decoder_of(model), self.blocks, self.batches, self._load_block)
        self.states = self._calls.states

    @property
    def nbytes(self) -> int:
        """Return the bytes of the hidden states and of the other block arguments."""
        return sum(state.nbytes for state in self.states) + self._calls.nbytes

    @property
    def is_reached(self) -> bool:
        """Whether the model calls the current block on text; it skips cross-attention to images."""
        return self.position in self._calls.order

    def second_moments(
        self, matrices: Sequence[Matrix], weights: dict[str, Float[Tensor, "windows context"]] | None = None
    ) -> SecondMoments:
        """Return the second moments of the inputs of the given matrices of the current block; the states do not change.

        `weights` (windows, context) by module name weigh tokens, by default equally.
        Errors: SourceError if a module with weights gets another number of tokens than a window has.
        """
        second_moments, block = SecondMoments(), self.blocks[self.position]
        if not self.is_reached:
            return second_moments
        leader_inputs: dict[str, Tensor] = {}
        hooks, span = [], slice(0, 0)

        def count(name: str, inputs: Tensor) -> None:
            own = weights.get(name) if weights else None
            if own is not None and inputs.shape[0] not in (span.stop - span.start, own[span].numel()):
                raise SourceError(
                    f"{name}: its inputs have shape {tuple(inputs.shape)} for {span.stop - span.start} windows, so "
                    "token weights do not apply; use --objective outputs"
                )
            second_moments.add(name, inputs, leader_inputs, None if own is None else own[span])

        for matrix in matrices:
            module = self.model.get_submodule(matrix.name) if matrix.expert is None else None
            if module is not None and linear_shape(module) is not None:
                hooks.append(
                    module.register_forward_pre_hook(lambda _, inputs, name=matrix.name: count(name, inputs[0]))
                )
        with torch.no_grad(), self.on_device(block):
            for number, batch in enumerate(self.batches):
                leader_inputs.clear()
                span = slice(span.stop, span.stop + len(batch))
                self.forward_block(block, number)
        for hook in hooks:
            hook.remove()
        return second_moments

    def advance(self) -> None:
        """Replace the states by the outputs of the current block with its present weights; go to the next block."""
        block = self.blocks[self.position]
        if self.is_reached:
            with torch.no_grad(), self.on_device(block):
                for number, state in enumerate(self.states):
                    self.states[number] = self.forward_block(block, number, True).to(state.device)
        self._calls.forget(self.position)
        self.position += 1

    @contextlib.contextmanager
    def on_device(self, block: nn.Module) -> Iterator[None]:
        """Move a block to the cache's device inside the context, without autocast and TF32."""
        home = module_device(block)
        with _full_precision(self.device):
            block.to(self.device)
            yield
            block.to(home)

    def forward_block(self, block: nn.Module, number: int, keep: bool = False) -> Float[Tensor, "*states hidden"]:
        """Return the output of `block`, in place of the current one, for batch `number`; it must be on the device.

        With `keep` its other outputs are stored for later blocks. A block that the model skips returns its input.
        """
        if not self.is_reached:
            return self.states[number].to(self.device)
        return self._calls.run(self.position, block, self.states[number], number, self.device, keep)

    @contextlib.contextmanager
    def _load_block(self, number: int) -> Iterator[torch.device]:
        """Load a block and move it to the device; on a CPU one batch through 135M parameters takes 10 s."""
        block = self.blocks[number]
        if self._block_loader is not None:
            self._block_loader.load_block(number)
        with self.on_device(block):
            yield self.device
        if self._block_loader is not None:
            self._block_loader.unload_block(number)


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Disable autocast and TF32: sums over 100,000 tokens must keep their small entries."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
