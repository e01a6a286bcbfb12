"""The walk over a model: which parameters are matrices to compress, and why the others are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from reallm.allocate.format_plan import PER_LAYER
from reallm.formats import Shape
from reallm.source.decoder_blocks import decoder_of
from reallm.source.families import FUSED_EXPERTS, POSITION_WORDS, READ_HIDDEN, WRITE_HIDDEN, is_router, matrix_role

EXCLUDED_BY_PLAN = "left out by the plan"  # why a matrix is kept


@runtime_checkable
class Readable(Protocol):
    """What `read_matrix` needs of a source."""

    def read(self, name: str, index: int | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Matrix:
    """One matrix to compress.

    `name` is the module path (for an expert `<module path>.<parameter>.<number>`), `parameter` the
    state-dict name to read, `shape` (out, in) as nn.Linear.weight whatever the model stores.
    """

    name: str
    parameter: str
    shape: Shape
    role: str
    kind: str  # "block" | "embedding" | "head"
    block: int | None = None
    transposed: bool = False  # stored (in, out): Conv1D of GPT-2, experts of gpt-oss
    expert: int | None = None  # slice of a fused (experts, ...) parameter


@dataclass(frozen=True)
class Unquantized:
    """A parameter or persistent buffer that stays as it is, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass
class Walk:
    """All of a model's state dict: `matrices`, `unquantized`, and `tied` names that are another's tensor."""

    matrices: list[Matrix] = field(default_factory=list)
    unquantized: list[Unquantized] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)  # state-dict name -> name of the tensor it is
    tied_heads: list[str] = field(default_factory=list)  # module paths that use the embedding's matrix


def walk(skeleton: nn.Module) -> Walk:
    """Sort every parameter and persistent buffer of a model (on the meta device) in model order.

    Nothing is skipped in silence: matrices, kept and tied together are the state dict.
    """
    place = _ModelStructure(skeleton)
    result = Walk(tied=place.tied, tied_heads=place.tied_heads)
    for path, module in skeleton.named_modules():
        for name, tensor in _own_state(module):
            full = f"{path}.{name}" if path else name
            if full in place.tied:
                continue
            found = place.classify_parameter(path, module, name, tensor)
            if isinstance(found, str):
                result.unquantized.append(Unquantized(full, tuple(tensor.shape), found))
            else:
                result.matrices.extend(found)
    return result


def read_matrix(source: Readable, matrix: Matrix) -> Tensor:
    """A matrix of the walk as (out, in), on the CPU in its stored dtype."""
    weight = source.read(matrix.parameter, matrix.expert)
    return weight.T.contiguous() if matrix.transposed else weight


def block_index(path: str) -> int | None:
    """Number of the decoder block a path lies in: its first number."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D, a linear that stores (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D


def linear_shape(module: nn.Module) -> Shape | None:
    """(out, in) of a module that acts exactly as a linear; None for any other."""
    if is_conv1d(module):
        return (module.weight.shape[1], module.weight.shape[0])
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return (module.out_features, module.in_features)
    return tuple(module.weight.shape) if _acts_as_linear(module) else None


def _acts_as_linear(module: nn.Module) -> bool:
    """Whether a module of an unknown class computes x · weightᵀ + bias and nothing more: it is tried on small numbers.

    Families write linears of their own (Falcon's class adds the bias in a step of its own), and others that scale,
    clamp or route.
    """
    own = dict(module.named_parameters(recurse=False))
    if set(own) not in ({"weight"}, {"weight", "bias"}) or own["weight"].ndim != 2 or any(module.children()):
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator, device="cpu") for shape in ((2, 5), (3, 5), (3,)))
    probe = {"weight": weight, "bias": bias} if "bias" in own else {"weight": weight}
    try:
        with torch.no_grad(), torch.device("cpu"):
            found = torch.func.functional_call(module, probe, (x,))
    except Exception:  # whatever an untrusted forward raises, it is no linear
        return False
    wanted = nn.functional.linear(x, weight, probe.get("bias"))
    return isinstance(found, Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-6)


def follows_experts_interface(module: nn.Module) -> bool:
    """Whether a module is one of transformers' experts, of which one forward of several is chosen."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def experts_transposed(module: nn.Module, hidden_size: int | None) -> bool | None:
    """Whether the 3-D parameters of a module of fused experts hold slices (in, out); None for all other modules.

    Of experts that no table knows the size of hidden states tells it, which gate and up read and down writes; where it
    does not, None.
    """
    if follows_experts_interface(module):
        return bool(module.is_transposed)
    kind = type(module).__name__
    if kind in FUSED_EXPERTS:
        return FUSED_EXPERTS[kind]
    sides = set()
    for name, parameter in module.named_parameters(recurse=False):
        role = matrix_role(name)
        if parameter.ndim == 3 and role in READ_HIDDEN | WRITE_HIDDEN and "expert" in kind.lower():
            hidden = [size == hidden_size for size in parameter.shape[1:]]
            if sum(hidden) == 1:  # (in, out) if those that read it have it first
                sides.add(hidden[0] == (role in READ_HIDDEN))
    return sides.pop() if len(sides) == 1 else None


def hidden_size_of(model: nn.Module) -> int | None:
    """Size of the hidden states between a model's decoder blocks, if its config says so."""
    return getattr(model.config.get_text_config(decoder=True), "hidden_size", None)


def _own_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers that a module holds itself."""
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


class _ModelStructure:
    """Where things are in a model: embedding, head, decoder blocks, ties."""

    def __init__(self, model: nn.Module) -> None:
        paths = {id(module): path for path, module in model.named_modules()}
        self.config = model.config.get_text_config(decoder=True)
        self.hidden_size = hidden_size_of(model)
        self.embedding = paths.get(id(model.get_input_embeddings()))
        self.head = paths.get(id(model.get_output_embeddings()))
        self.decoder = paths.get(id(decoder_of(model)), "")
        self.tied = tied_names(model)
        self.tied_heads = [n.removesuffix(".weight") for n in self.tied if n == f"{self.head}.weight"]

    def classify_parameter(self, path: str, module: nn.Module, name: str, tensor: Tensor) -> list[Matrix] | str:
        """The matrices that a parameter is, or the reason to keep it."""
        full = f"{path}.{name}" if path else name
        if name == "weight" and path == self.embedding and isinstance(module, nn.Embedding):
            return [Matrix(path, full, tuple(tensor.shape), "embedding", "embedding")]
        if name == "weight" and self._looks_up_tokens(path, module):
            return [Matrix(path, full, tuple(tensor.shape), PER_LAYER, "embedding")]
        shape = linear_shape(module) if name == "weight" else None
        if shape is not None and path == self.head:
            return [Matrix(path, full, shape, "head", "head", transposed=is_conv1d(module))]
        if shape is not None and self._is_in_block(path) and not is_router(path, shape[0], self.config):
            return [Matrix(path, full, shape, matrix_role(path), "block", block_index(path), is_conv1d(module))]
        if tensor.ndim == 3 and name in module._parameters and self._is_in_block(path):
            transposed = experts_transposed(module, self.hidden_size)
            if transposed is not None:
                return self._experts(full, transposed, tensor)
        return self._reason(path, module, name, tensor)

    def _experts(self, full: str, transposed: bool, tensor: Tensor) -> list[Matrix]:
        """One matrix per slice of a fused (experts, ...) parameter."""
        rows, columns = tensor.shape[1:]
        shape = (columns, rows) if transposed else (rows, columns)
        return [
            Matrix(f"{full}.{e}", full, shape, matrix_role(full), "block", block_index(full), transposed, e)
            for e in range(tensor.shape[0])
        ]

    def _looks_up_tokens(self, path: str, module: nn.Module) -> bool:
        """Whether a module of the decoder is another table of the whole vocabulary."""
        if not isinstance(module, nn.Embedding) or (self.decoder and not path.startswith(f"{self.decoder}.")):
            return False
        sizes = {value for key, value in vars(self.config).items() if key.startswith("vocab_size")}
        return module.num_embeddings in sizes and not _is_position(path, module)

    def _is_in_block(self, path: str) -> bool:
        inside = not self.decoder or path.startswith(f"{self.decoder}.")
        return inside and block_index(path.removeprefix(self.decoder)) is not None

    def _reason(self, path: str, module: nn.Module, name: str, tensor: Tensor) -> str:
        """Why a parameter is kept, in a few words for the plan."""
        kind = type(module).__name__
        if name not in module._parameters:
            return "buffer"
        if name.endswith("bias"):
            return "bias"
        if "norm" in kind.lower() or "norm" in path.rpartition(".")[2].lower():
            return "norm"
        if isinstance(module, nn.Embedding):
            return "position embedding" if _is_position(path, module) else "embedding beside the input's"
        if tensor.ndim == 1:
            return "1-D"
        if "router" in kind.lower() or is_router(path, tensor.shape[0], self.config):
            return "router"
        if linear_shape(module) is not None:
            return "outside the decoder blocks"
        return f"{tensor.ndim}-D parameter of {kind}"


def _is_position(path: str, module: nn.Module) -> bool:
    return any(word in f"{path} {type(module).__name__}".lower() for word in POSITION_WORDS)


def tied_names(model: nn.Module) -> dict[str, str]:
    """State-dict names that are another's tensor -> that one; the input embedding is never the tied one."""
    embedding = next((f"{p}.weight" for p, m in model.named_modules() if m is model.get_input_embeddings()), None)
    tied: dict[str, str] = {}
    for target, owner in dict(model.all_tied_weights_keys).items():
        if target == embedding:
            target, owner = owner, target
        tied[target] = owner
    return tied


def meta_model(config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """A causal language model of a config on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return build_model(config, dtype or torch.float32)


def build_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """A causal language model of a config, whatever quantisation it speaks of, on the default device."""
    import copy

    from transformers import AutoModelForCausalLM

    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return AutoModelForCausalLM.from_config(plain, dtype=dtype)
