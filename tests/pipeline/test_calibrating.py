"""What the original is asked in, and by which processor."""

import pytest
import torch

from reallm.model import open_source
from reallm.model.devices import multiplies_bfloat16
from reallm.pipeline.calibrating import gradient_dtype


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_gradients_are_in_bfloat16_only_where_the_processor_multiplies_it(tiny_llama, monkeypatch, native, dtype):
    monkeypatch.setattr("reallm.pipeline.calibrating.multiplies_bfloat16", lambda: native)
    source = open_source(tiny_llama)
    assert gradient_dtype(source, "cpu") == dtype and gradient_dtype(source, "cuda") == torch.float32


@pytest.mark.parametrize(
    ("known", "native"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True, "avx512_bf16": False}, False)],
)
def test_a_processor_is_asked_for_its_instructions(monkeypatch, known, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert multiplies_bfloat16() is native
