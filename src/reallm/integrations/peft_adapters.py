"""Use PEFT with compressed models. Needs `pip install ".[peft]"`.

Compressed modules inherit from nn.Linear and nn.Embedding, so that PEFT trains adapters and soft prompts on them. The
modules themselves refuse what PEFT would write into weights (merging, PiSSA).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn

from reallm.errors import ArtifactError, install_hint


def accept_compressed_linears(config: Any) -> Any:
    """Return the config unchanged: PEFT accepts compressed modules as they are. Kept for existing callers.

    Errors: ArtifactError if peft is not installed.
    """
    _require_peft()
    return config


def load_peft_model(model: nn.Module, adapter: str | Path, name: str = "default") -> Any:
    """Return a PeftModel of a compressed model with the adapter in a folder, from reallm or PEFT, of any PEFT type.

    If `model` is already a PeftModel, the adapter is added to it; `set_adapter` and `add_weighted_adapter` of PEFT
    select among them.
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
        raise ArtifactError(f"PEFT is not installed: {install_hint('peft')}")
