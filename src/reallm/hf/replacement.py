"""Replace modules of a model on the meta device by compressed ones, and compressed ones by plain ones."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from reallm.errors import ArtifactError
from reallm.formats import WeightFormat, collect_shared_decoders
from reallm.formats.shared_decoders import PREFIX as SHARED
from reallm.hf.modules import (
    CompressedEmbedding,
    CompressedExpert,
    CompressedExperts,
    CompressedLinear,
    SharedDecoders,
    TiedLinear,
    _CompressedModule,
)
from reallm.source.walk import (
    experts_transposed,
    follows_experts_interface,
    hidden_size_of,
    is_conv1d,
    linear_shape,
    tied_names,
)


def replace_with_compressed(model: nn.Module, formats: dict[str, WeightFormat]) -> None:
    """Replace the module at every path of `formats` by one that stores the matrix in its format.

    Weights tied to a replaced module become modules that share its tensors, and are removed from the tied weights
    that transformers handles.
    Errors: ArtifactError naming a path that is not a matrix of this model; FormatError for a bad shape.
    """
    ties = _compressed_ties(model, formats)
    _remove_ties(model, set(ties))
    experts: dict[str, dict[int, WeightFormat]] = defaultdict(dict)
    for path, fmt in formats.items():
        parent, _, last = path.rpartition(".")
        if last.isdigit() and _is_parameter(model, parent):
            experts[parent][int(last)] = fmt
        else:
            model.set_submodule(path, _replacement(_module(model, path), path, fmt))
    holders = {path: model.get_submodule(path.rpartition(".")[0]) for path in experts}
    # Before the first replacement: for some modules it takes all parameters to know.
    transposed = {path: experts_transposed(holder, hidden_size_of(model)) for path, holder in holders.items()}
    for path, by_number in experts.items():
        _replace_experts(model, path, by_number, transposed[path])
    for target, owner in ties.items():
        _replace_tied(model, target.removesuffix(".weight"), owner.removesuffix(".weight"))
    if shared_decoders := collect_shared_decoders(formats.values()):
        shared = SharedDecoders(shared_decoders)
        model.add_module(SHARED, shared)
        for module in compressed_modules(model).values():
            module.set_shared_decoders(shared)


def replace_with_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every compressed module by its dense counterpart, decoded to `dtype`, and tie weights again."""
    for path, module in list(model.named_modules()):
        if isinstance(module, CompressedExperts):
            parent, _, name = path.rpartition(".")
            holder = model.get_submodule(parent)
            del holder._modules[name]
            holder.register_parameter(name, module.dense_parameter(dtype))
        elif isinstance(module, (CompressedLinear, CompressedEmbedding, TiedLinear)):
            model.set_submodule(path, module.dense_module(dtype))
    model._modules.pop(SHARED, None)
    for module in model.modules():
        if "_tied_weights_keys" in module.__dict__:
            del module._tied_weights_keys
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()
    # From now on it is saved as transformers saves a model of this family.
    model._weight_conversions = None


def compressed_modules(model: nn.Module) -> dict[str, _CompressedModule]:
    """Return every module that stores a compressed matrix, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, _CompressedModule)}


def _replacement(module: nn.Module, path: str, fmt: WeightFormat) -> nn.Module:
    """Return the compressed module that replaces a plain one."""
    if isinstance(module, nn.Embedding):
        shape = (module.num_embeddings, module.embedding_dim)
        fmt.check(shape)
        return CompressedEmbedding(fmt, shape, module.weight.dtype, module)
    if (shape := linear_shape(module)) is None:
        raise ArtifactError(f"{path}: is a {type(module).__name__}, not a matrix; the artifact is of another model")
    fmt.check(shape)
    return CompressedLinear(fmt, shape, module.weight.dtype, getattr(module, "bias", None), is_conv1d(module))


def _replace_experts(model: nn.Module, path: str, by_number: dict[int, WeightFormat], transposed: bool | None) -> None:
    """Replace a fused parameter of experts by modules, one per expert."""
    parent, _, name = path.rpartition(".")
    holder, parameter = model.get_submodule(parent), model.get_parameter(path)
    count = parameter.shape[0]
    if transposed is None or parameter.ndim != 3:
        raise ArtifactError(f"{path}: is not a parameter of experts; the artifact is of another model")
    if sorted(by_number) != list(range(count)):
        missing = sorted(set(range(count)) - set(by_number))
        raise ArtifactError(f"{path}: {len(by_number)} of {count} experts have a format; expert {missing} has none")
    shape = tuple(reversed(parameter.shape[1:])) if transposed else tuple(parameter.shape[1:])
    experts = []
    for number in range(count):
        by_number[number].check(shape)
        experts.append(CompressedExpert(by_number[number], shape, parameter.dtype))
    del holder._parameters[name]
    holder.add_module(name, CompressedExperts(experts, transposed))
    holder._is_hf_initialized = True
    if follows_experts_interface(holder):
        # Only the eager loop reads experts one by one; batched implementations need one tensor.
        holder.config._experts_implementation = "eager"


def _replace_tied(model: nn.Module, path: str, owner_path: str) -> None:
    owner, module = model.get_submodule(owner_path), _module(model, path)
    if not isinstance(module, nn.Linear):
        raise ArtifactError(f"{path}: is a {type(module).__name__} tied to {owner_path}, which reallm cannot share")
    model.set_submodule(path, TiedLinear(owner, module.bias))


def _compressed_ties(model: nn.Module, formats: dict[str, WeightFormat]) -> dict[str, str]:
    """Return the ties (tied name -> owner's name) whose owner is compressed."""
    return {t: o for t, o in tied_names(model).items() if o.removesuffix(".weight") in formats}


def _remove_ties(model: nn.Module, targets: set[str]) -> None:
    """Remove ties from the tied weights that transformers handles: their parameters no longer exist."""
    from transformers import PreTrainedModel

    if not targets:
        return
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            prefix = f"{path}." if path else ""
            remaining = {
                target: owner
                for target, owner in module.get_expanded_tied_weights_keys().items()
                if not targets & {prefix + target, prefix + owner}
            }
            # On the instance, which overrides the class: a later model.tie_weights() reads it.
            module._tied_weights_keys = remaining
            module.all_tied_weights_keys = {
                t: o for t, o in module.all_tied_weights_keys.items() if not targets & {prefix + t, prefix + o}
            }


def _is_parameter(model: nn.Module, path: str) -> bool:
    try:
        model.get_parameter(path)
    except AttributeError:
        return False
    return True


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as problem:
        raise ArtifactError(f"{path}: this model has no such module; the artifact is of another model") from problem
