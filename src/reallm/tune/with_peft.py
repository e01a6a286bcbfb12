"""PEFT over compressed models. Needs `pip install ".[peft]"`.

Compressed modules are linears and embeddings for PEFT, so that its adapters and soft prompts train over them. What it
writes into weights (merging, PiSSA) is refused by the modules themselves.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn

from reallm.errors import ArtifactError, install


def knowing_us(config: Any) -> Any:
    """The same config: PEFT takes compressed modules without being told. Kept for those who call it.

    Errors: ArtifactError if peft is not installed.
    """
    _require_peft()
    return config


def load_into(model: nn.Module, adapter: str | Path, name: str = "default") -> Any:
    """A PeftModel of a loaded compressed model with the adapter in a folder, ours or PEFT's, of any kind that PEFT has.

    Given that PeftModel it takes another adapter beside the first; `set_adapter` and `add_weighted_adapter` of PEFT
    choose among them.
    Errors: ArtifactError if peft is not installed.
    """
    _require_peft()
    from peft import PeftModel

    if isinstance(model, PeftModel):
        model.load_adapter(str(adapter), adapter_name=name)
        return model
    return PeftModel.from_pretrained(model, str(adapter), adapter_name=name)


def _require_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise ArtifactError(f"PEFT is not installed: {install('peft')}")
