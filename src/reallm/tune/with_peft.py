"""PEFT beside us: LoRA of PEFT on compressed modules. Needs `pip install ".[peft]"`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn

from reallm.errors import ArtifactError, install
from reallm.model import CompressedLinear


def knowing_us(config: Any) -> Any:
    """The same LoraConfig, which now takes compressed linears too: for `peft.get_peft_model` and `PeftModel`.

    Errors: ArtifactError if peft is not installed.
    """
    _require_peft()
    config._register_custom_module({CompressedLinear: _layer_class()})
    return config


def load_into(model: nn.Module, adapter: str | Path, name: str = "default") -> Any:
    """A PeftModel of a loaded compressed model with the adapter in a folder, ours or PEFT's.

    Given that PeftModel it takes another adapter beside the first; `set_adapter` and `add_weighted_adapter` of PEFT
    choose among them.
    Errors: ArtifactError if peft is not installed.
    """
    _require_peft()
    from peft import LoraConfig, PeftModel

    config = knowing_us(LoraConfig.from_pretrained(str(adapter)))
    if isinstance(model, PeftModel):
        model.load_adapter(str(adapter), adapter_name=name, peft_config=config)
        return model
    return PeftModel.from_pretrained(model, str(adapter), adapter_name=name, config=config)


def _layer_class() -> Any:
    from peft.tuners.lora import Linear

    class LoraOnCompressed(Linear):
        """PEFT's LoRA of a linear. Merging needs a dense weight: `adapters.merge` does it in the file instead."""

        def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
            # PEFT's own function knows no registered module and warns of an "unsupported layer type".
            return module.in_features, module.out_features

        def merge(self, *arguments: Any, **named: Any) -> None:
            raise ArtifactError("a compressed weight cannot be merged into: save the adapter, then use adapters.merge")

    return LoraOnCompressed


def _require_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise ArtifactError(f"PEFT is not installed: {install('peft')}")
