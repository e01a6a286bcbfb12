"""Compute of tuning: checkpointed blocks, and early stopping of epochs."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import reallm
from reallm.tuning import blockwise

SMALL = {"context": 16, "batch": 2, "validation_windows": 2}
BLOCKS, STEPS = 2, 3


@pytest.mark.parametrize(("checkpointing", "runs"), [(True, 2), (False, 1)])
def test_checkpointing_runs_every_block_again_for_its_gradient(
    compressed, tuning_text, tmp_path, monkeypatch, checkpointing, runs
):
    plain, with_gradient = LlamaDecoderLayer.forward, []

    def counted(self, *arguments, **named):
        with_gradient.append(torch.is_grad_enabled())
        return plain(self, *arguments, **named)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    options = {**SMALL, "loss": "ce", "tokens": STEPS * 2 * 16, "checkpointing": checkpointing}
    reallm.tune(compressed, tmp_path / "out", text=(tuning_text,), **options)
    assert sum(with_gradient) == runs * BLOCKS * STEPS


@pytest.mark.parametrize(("patience", "epochs"), [(0, 1), (2, 3), (9, 4)])
def test_a_block_is_left_when_it_was_no_better_for_longer_than_patience(
    compressed, tiny_llama, tuning_text, tmp_path, monkeypatch, patience, epochs
):
    monkeypatch.setattr(blockwise.Optimizer, "step", lambda self: 0.0)  # no epoch improves
    options = {**SMALL, "method": "blockwise", "block_windows": 2, "block_epochs": 4, "block_patience": patience}
    tuned = reallm.tune(compressed, tmp_path / "out", text=(tuning_text,), reference=str(tiny_llama), **options)
    ran = [(event["block"], event["epoch"]) for event in tuned.events if event["phase"] == "block"]
    assert ran == [(block, epoch) for block in range(BLOCKS) for epoch in range(epochs + 1)]  # 0: before the first
