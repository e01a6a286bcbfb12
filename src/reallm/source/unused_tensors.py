"""Tensors and files of a source that its model does not use: some are listed, others refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from reallm.checkpoint.headers import Header
from reallm.errors import SourceError

# Name components that a wrapper around a module adds: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
_PARALLEL = "module"  # DataParallel's prefix: a common word, so it counts only at the beginning
_ADAPTER = re.compile(
    r"(^|\.)(base_layer|base_model\.model|original_module|modules_to_save|lora_\w+|ia3_l|hada_\w+|lokr_\w+|oft_\w+|boft_\w+"
    r"|vera_\w+|randlora_\w+|adalora_\w+|fourierft_\w+|prompt_embeddings|prompt_encoder|adaption_prompt|adaption_gate"
    r"|trainable_tokens_\w+)(\.|$)"
)
# Last name components of auxiliary tensors in a quantized export: FP8, compressed-tensors, GPTQ, AWQ, bitsandbytes,
# MXFP4.
_QUANTIZED = re.compile(
    r"(^|_)(scale|scales|scale_inv|zero_point|zeros|qzeros|qweight|g_idx|packed|absmax|quant_map|SCB|blocks|weight_shape)"
    r"(_\d+)?$|quant_state"
)
# Tables that models compute themselves, saved by older versions.
_TABLES = re.compile(
    r"^rope_f(reqs|actors_\w+)\.weight$|attn_rot_embd|(^|\.)(inv_freq|original_inv_freq|masked_bias|position_ids|cos_cached|sin_cached|_float_tensor)$"
)
_PREDICTION = re.compile(r"(^|[._])(mtp|nextn|eh_proj|enorm|hnorm|shared_head)([._]|$|\d)")
# Config keys for the number of prediction blocks after the decoder's.
_MORE_BLOCKS = (
    *("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules", "mtp_num_layers"),
)
_OTHER_MODALITIES = re.compile(
    r"(^|[._])(visual|vision|image|video|audio|speech|sound|talker|token2wav|code2wav|multi_modal|multimodal|mm)([._]|$)"
)
# Siblings of the decoder blocks that are not part of the text model's computation.
_HEADS = re.compile(
    r"(^|[._])(head|heads|score|classifier|pool|pooler|projector|adapter|version|v_head|reward)([._]|$|\d)"
)


@dataclass(frozen=True)
class Unused:
    """Tensors of a source that its model has no place for, or a file that is not read.

    `name` is the common part of their names, with numbers as `*`; `tensors` is 0 for files.
    """

    name: str
    reason: str
    tensors: int
    nbytes: int

    def to_dict(self) -> dict[str, str | int]:
        """Return plain JSON values."""
        return {"name": self.name, "reason": self.reason, "tensors": self.tensors, "nbytes": self.nbytes}


def unused_tensors(
    label: str,
    skeleton: nn.Module,
    stored: Mapping[str, Header],
    names: Mapping[str, str],
    is_zero: Callable[[str], bool],
) -> list[Unused]:
    """List the `stored` tensors that a model (on the meta device) has no place for, grouped by name and reason.

    `names` maps each to its name in the model; `is_zero` returns whether a tensor is all zeros.
    Errors: SourceError with the remedy for a tensor without which the model computes other values.
    """
    model = _ModelNames(skeleton)
    found: dict[tuple[str, str], list[int]] = {}
    for key, tensor in stored.items():
        name, reason = model.classify(label, key, names.get(key, key), tensor, is_zero)
        found.setdefault((name, reason), []).append(tensor.nbytes)
    return [Unused(name, reason, len(sizes), sum(sizes)) for (name, reason), sizes in found.items()]


def unused_files(files: Iterable[Path], reason: str) -> list[Unused]:
    """List files that are not read; files whose names differ only in numbers are one entry."""
    found: dict[str, int] = {}
    for file in files:
        name = re.sub(r"\d{4,}", "*", file.name)
        found[name] = found.get(name, 0) + file.stat().st_size
    return [Unused(name, reason, 0, nbytes) for name, nbytes in sorted(found.items())]


class _ModelNames:
    """Modules and tensor names of a model, to locate where an unknown tensor would belong."""

    def __init__(self, skeleton: nn.Module) -> None:
        self.kind = type(skeleton).__name__
        self.modules = dict(skeleton.named_modules())
        self.state = frozenset(skeleton.state_dict())
        self.tables = frozenset(name for name, _ in skeleton.named_buffers()) - self.state
        self.prefix = skeleton.base_model_prefix
        self.config = skeleton.config.get_text_config(decoder=True)
        decoder = skeleton.get_decoder()
        self.decoder = next((path for path, module in self.modules.items() if module is decoder), "")
        patterns = {
            pattern
            for module in self.modules.values()
            for pattern in (getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())
        }
        self.ignored = re.compile("|".join(f"(?:{pattern})" for pattern in sorted(patterns)) or "(?!)")

    def classify(
        self, label: str, key: str, name: str, tensor: Header, is_zero: Callable[[str], bool]
    ) -> tuple[str, str]:
        """Return (name to list a tensor under, reason why it is not used).

        Errors: SourceError if the model computes other values without it.
        """
        candidates = (name, key, key.removeprefix(f"{self.prefix}."), f"{self.prefix}.{key}")
        self._refuse_leftovers(label, key, candidates)
        owner, rest = max((self._owner(candidate) for candidate in candidates), key=lambda pair: len(pair[0]))
        first = rest.partition(".")[0]
        listed = f"{key.removesuffix(rest)}{first}" if key.endswith(rest) else key
        if first.isdigit() and f".{first}." in key:  # a renamed expert of a block after the last
            listed = f"{key.partition(f'.{first}.')[0]}.{first}"
        if _TABLES.search(key) or self._is_own_table(candidates, tensor):
            return _mask_numbers(key), "a table that the model computes itself"
        if self.ignored.search(key) or self.ignored.search(name):
            return _mask_numbers(listed), self._reason(key)
        if first.isdigit() and isinstance(self.modules[owner], nn.ModuleList):
            if not (_PREDICTION.search(key) or self._is_prediction_block(int(first), len(self.modules[owner]))):
                raise SourceError(
                    f"{label}: holds {key!r}, but config.json describes {len(self.modules[owner])} blocks; weights and "
                    "config are of different models"
                )
            return _mask_numbers(listed, first), f"multi-token prediction, which {self.kind} does not have"
        if self._is_inside(owner, rest, key):
            if key.endswith("bias") and is_zero(key):
                return _mask_numbers(key), "zeros, which add nothing"
            raise SourceError(f"{label}: {self._refusal(key)}")
        return _mask_numbers(listed), self._reason(key)

    def _owner(self, name: str) -> tuple[str, str]:
        """Return (the innermost module of the model on a name's path, the rest of the name)."""
        parts = name.split(".")
        for count in range(len(parts) - 1, 0, -1):
            if (path := ".".join(parts[:count])) in self.modules:
                return path, ".".join(parts[count:])
        return "", name

    def _is_inside(self, owner: str, rest: str, key: str) -> bool:
        """Return whether a tensor would be part of the text model's computation."""
        if owner and (not any(self.modules[owner].children()) or any(part.isdigit() for part in owner.split("."))):
            return True
        if not owner or owner != self.decoder or rest.count(".") > 1:
            return False
        return not any(pattern.search(key) for pattern in (_PREDICTION, _OTHER_MODALITIES, _HEADS))

    def _is_own_table(self, candidates: Iterable[str], tensor: Header) -> bool:
        """Return whether it is a non-persistent buffer, or a causal mask (1, 1, n, n) of old GPT-2 checkpoints."""
        shape = tensor.shape
        mask = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3] > 1
        return mask or any(candidate in self.tables for candidate in candidates)

    def _is_prediction_block(self, number: int, count: int) -> bool:
        more = [value for key in _MORE_BLOCKS if isinstance(value := getattr(self.config, key, None), int)]
        return number < count + max(more, default=0)

    def _reason(self, key: str) -> str:
        if _OTHER_MODALITIES.search(key):
            return f"for images, video or sound, and {self.kind} is the text model alone"
        if _PREDICTION.search(key):
            return f"multi-token prediction, which {self.kind} does not have"
        return f"{self.kind} has no place for it"

    def _refuse_leftovers(self, label: str, key: str, candidates: Iterable[str]) -> None:
        """Raise SourceError for names of wrappers and adapters, and for two tensors with one name."""
        parts = key.split(".")
        wrapped = parts[0] == _PARALLEL and _PARALLEL not in self.modules
        if wrapped or (found := _WRAPPERS.intersection(parts)):
            wrapper = _PARALLEL if wrapped else min(found)
            raise SourceError(
                f"{label}: {key!r} contains the name of a wrapper ({wrapper}); save the model inside the wrapper, or "
                "remove that component from the names"
            )
        if _ADAPTER.search(key):
            raise SourceError(
                f"{label}: {key!r} belongs to an adapter; merge it into the model (merge_and_unload in PEFT), save "
                "the merged model and give that"
            )
        if same := next((candidate for candidate in candidates if candidate in self.state), None):
            raise SourceError(
                f"{label}: {key!r} and another tensor of the files are both {same!r} in the model; keep one of them"
            )

    def _refusal(self, key: str) -> str:
        if _QUANTIZED.search(key.rpartition(".")[2]):
            return f"{key!r} is part of quantized weights, which config.json does not declare; give the original model"
        return (
            f"holds {key!r}, for which {self.kind} as config.json describes it has no place; it would compute other "
            "values without it; give the config.json that was saved with the weights, or remove the tensor"
        )


def _mask_numbers(name: str, last: str = "") -> str:
    """Return a name with its numbers replaced by `*`, except in its `last` component."""
    head = name.removesuffix(f".{last}") if last else name
    text = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", head)
    return f"{text}.{last}" if last else text
