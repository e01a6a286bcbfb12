"""The decoder of a causal language model, and its blocks."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from reallm.errors import SourceError


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the submodule of a causal language model that maps token ids to hidden states.

    This is `get_decoder()`, unless that returns a module without blocks (ModernBERT's output matrix) or the model with
    its lm_head (Llama 4): then it is the innermost model around the blocks. A model without blocks is returned itself.
    """
    try:
        named = model.get_decoder()
    except (AttributeError, NotImplementedError):
        named = None
    if isinstance(named, nn.Module) and named is not model and _block_list(named, model) is not None:
        return named
    return _innermost_around(_block_list(model, model), model)


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the decoder blocks in order.

    They are the module list of the decoder with the most parameters, preferably one of `num_hidden_layers` modules.

    Errors: SourceError if there is none.
    """
    found = _block_list(decoder_of(model), model)
    if found is None:
        raise SourceError(
            f"{type(model).__name__} has no list of decoder blocks; "
            "it can be neither calibrated nor tuned block by block"
        )
    return list(found)


def block_numbers(model: nn.Module, names: Iterable[str]) -> dict[str, int | None]:
    """Return the number of the decoder block that contains each module path; None for a path outside the blocks."""
    numbers = {id(block): number for number, block in enumerate(decoder_blocks(model))}
    prefixes = {f"{path}.": numbers[id(module)] for path, module in model.named_modules() if id(module) in numbers}

    def number_of(name: str) -> int | None:
        return next((number for prefix, number in prefixes.items() if name.startswith(prefix)), None)

    return {name: number_of(name) for name in names}


def _block_list(module: nn.Module, model: nn.Module) -> nn.ModuleList | None:
    lists = [inner for inner in module.modules() if isinstance(inner, nn.ModuleList) and len(inner)]
    layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    of_config = [inner for inner in lists if len(inner) == layers]
    return max(of_config or lists, key=lambda inner: sum(p.numel() for p in inner.parameters()), default=None)


def _innermost_around(blocks: nn.ModuleList | None, model: nn.Module) -> nn.Module:
    from transformers import PreTrainedModel

    found = model
    for module in model.modules():  # outer modules come before the modules they contain
        if isinstance(module, PreTrainedModel) and any(inner is blocks for inner in module.modules()):
            found = module
    return found
