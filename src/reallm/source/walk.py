"""The walk over a model: which parameters are matrices to compress, and why the others stay unquantized."""

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

EXCLUDED_BY_PLAN = "left out by the plan"  # why a matrix stays unquantized


@runtime_checkable
class Readable(Protocol):
    """The interface of a source that `read_matrix` needs."""

    def read(self, name: str, index: int | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Matrix:
    """One matrix to compress.

    `name` is the module path (for an expert `<module path>.<parameter>.<number>`), `parameter` the state-dict name to
    read, `shape` (out, in) as in nn.Linear.weight, whatever the stored orientation.
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
    """A parameter or persistent buffer that stays unquantized, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass
class Walk:
    """A model's complete state dict: `matrices`, `unquantized`, and `tied` names that share another name's tensor."""

    matrices: list[Matrix] = field(default_factory=list)
    unquantized: list[Unquantized] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)  # state-dict name -> name of the tensor it shares
    tied_heads: list[str] = field(default_factory=list)  # module paths that use the embedding's matrix


def walk(skeleton: nn.Module) -> Walk:
    """Classify every parameter and persistent buffer of a model (on the meta device), in model order.

    Nothing is skipped in silence: matrices, unquantized and tied together are the state dict.
    """
    structure = _ModelStructure(skeleton)
    result = Walk(tied=structure.tied, tied_heads=structure.tied_heads)
    for path, module in skeleton.named_modules():
        for name, tensor in _own_state(module):
            full = f"{path}.{name}" if path else name
            if full in structure.tied:
                continue
            found = structure.classify_parameter(path, module, name, tensor)
            if isinstance(found, str):
                result.unquantized.append(Unquantized(full, tuple(tensor.shape), found))
            else:
                result.matrices.extend(found)
    return result


def read_matrix(source: Readable, matrix: Matrix) -> Tensor:
    """Read a matrix of the walk as (out, in), on the CPU in its stored dtype."""
    weight = source.read(matrix.parameter, matrix.expert)
    return weight.T.contiguous() if matrix.transposed else weight


def block_index(path: str) -> int | None:
    """Return the number of the decoder block of a path, its first number; None if it has none."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D, a linear that stores (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D


def linear_shape(module: nn.Module) -> Shape | None:
    """Return (out, in) of a module that computes exactly a linear map plus bias; None for any other."""
    if is_conv1d(module):
        return (module.weight.shape[1], module.weight.shape[0])
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return (module.out_features, module.in_features)
    return tuple(module.weight.shape) if _computes_linear(module) else None


def _computes_linear(module: nn.Module) -> bool:
    """Return whether a module of an unknown class computes x · weightᵀ + bias and nothing else, by running it.

    Families define their own linears (Falcon's class adds the bias in a separate step), and others that scale, clamp
    or route.
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
    except Exception:  # whatever an untrusted forward raises, it is not a linear
        return False
    expected = nn.functional.linear(x, weight, probe.get("bias"))
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, atol=1e-6)


def follows_experts_interface(module: nn.Module) -> bool:
    """Return whether a module implements the experts interface of transformers, with a selectable forward."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def experts_transposed(module: nn.Module, hidden_size: int | None) -> bool | None:
    """Return whether the 3-D parameters of a module of fused experts store slices (in, out); None for other modules.

    For experts of an unknown class the hidden size decides, which is the input size of gate and up and the output size
    of down; if it is ambiguous, the result is None.
    """
    if follows_experts_interface(module):
        return bool(module.is_transposed)
    kind = type(module).__name__
    if kind in FUSED_EXPERTS:
        return FUSED_EXPERTS[kind]
    orientations = set()
    for name, parameter in module.named_parameters(recurse=False):
        role = matrix_role(name)
        if parameter.ndim == 3 and role in READ_HIDDEN | WRITE_HIDDEN and "expert" in kind.lower():
            hidden = [size == hidden_size for size in parameter.shape[1:]]
            if sum(hidden) == 1:  # (in, out) if the hidden size is the first axis of matrices that read it
                orientations.add(hidden[0] == (role in READ_HIDDEN))
    return orientations.pop() if len(orientations) == 1 else None


def hidden_size_of(model: nn.Module) -> int | None:
    """Return the size of the hidden states between decoder blocks; None if the config lacks it."""
    return getattr(model.config.get_text_config(decoder=True), "hidden_size", None)


def _own_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and persistent buffers of a module itself, without submodules."""
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


class _ModelStructure:
    """Paths of a model's embedding, lm_head, decoder and tied tensors."""

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
        """Return the matrices of a parameter, or the reason why it stays unquantized."""
        full = f"{path}.{name}" if path else name
        if name == "weight" and path == self.embedding and isinstance(module, nn.Embedding):
            return [Matrix(path, full, tuple(tensor.shape), "embedding", "embedding")]
        if name == "weight" and self._is_token_embedding(path, module):
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
        """Return one matrix per slice of a fused (experts, ...) parameter."""
        rows, columns = tensor.shape[1:]
        shape = (columns, rows) if transposed else (rows, columns)
        return [
            Matrix(f"{full}.{e}", full, shape, matrix_role(full), "block", block_index(full), transposed, e)
            for e in range(tensor.shape[0])
        ]

    def _is_token_embedding(self, path: str, module: nn.Module) -> bool:
        """Return whether a module of the decoder is a further embedding over the whole vocabulary."""
        if not isinstance(module, nn.Embedding) or (self.decoder and not path.startswith(f"{self.decoder}.")):
            return False
        sizes = {value for key, value in vars(self.config).items() if key.startswith("vocab_size")}
        return module.num_embeddings in sizes and not _is_position(path, module)

    def _is_in_block(self, path: str) -> bool:
        inside = not self.decoder or path.startswith(f"{self.decoder}.")
        return inside and block_index(path.removeprefix(self.decoder)) is not None

    def _reason(self, path: str, module: nn.Module, name: str, tensor: Tensor) -> str:
        """Return why a parameter stays unquantized, in a few words for the plan."""
        kind = type(module).__name__
        if name not in module._parameters:
            return "buffer"
        if name.endswith("bias"):
            return "bias"
        if "norm" in kind.lower() or "norm" in path.rpartition(".")[2].lower():
            return "norm"
        if isinstance(module, nn.Embedding):
            return "position embedding" if _is_position(path, module) else "embedding other than the input embedding"
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
    """Map tied state-dict names to the name of the tensor they share; the input embedding is never a key."""
    embedding = next((f"{p}.weight" for p, m in model.named_modules() if m is model.get_input_embeddings()), None)
    tied: dict[str, str] = {}
    for target, owner in dict(model.all_tied_weights_keys).items():
        if target == embedding:
            target, owner = owner, target
        tied[target] = owner
    return tied


def meta_model(config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """Build a causal language model from a config on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return build_model(config, dtype or torch.float32)


def build_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """Build a causal language model from a config on the default device, ignoring its quantisation."""
    import copy

    from transformers import AutoModelForCausalLM

    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return AutoModelForCausalLM.from_config(plain, dtype=dtype)
