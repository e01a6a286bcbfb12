"""Step sizes of the optimizer: along a constant gradient, Adam's step is its learning rate."""

import math

import pytest
import torch
from torch import nn

from reallm.tuning.distributed import ProcessGroup
from reallm.tuning.optimizer import Optimizer


def descent(steps=16, warm_up=0.0, clip=1.0):
    parameters = {"one": nn.Parameter(torch.tensor([4.0])), "other": nn.Parameter(torch.tensor([4.0]))}
    return Optimizer(parameters, steps, 0.1, warm_up, clip, ProcessGroup())


def step(descent, *gradients):
    """Return the change of each parameter, and the gradient norm that `step` returns."""
    parameters = list(descent.parameters.values())
    before = torch.cat(parameters).detach().clone()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor([gradient])
    norm = descent.step()
    return (before - torch.cat(parameters).detach()).tolist(), norm


def test_steps_grow_in_a_line_and_shrink_along_half_a_cosine():
    of_all = descent(steps=16, warm_up=0.25)
    sizes = [step(of_all, 0.3, 0.4)[0] for _ in range(16)]
    up = [0.1 * n / 4 for n in (1, 2, 3, 4)]
    down = [0.1 * (1 + math.cos(math.pi * n / 12)) / 2 for n in range(12)]
    assert [one for one, _ in sizes] == pytest.approx(up + down, rel=1e-3)
    assert of_all.rate() == pytest.approx(0, abs=1e-9)


def test_without_a_warm_up_the_first_step_is_the_largest():
    assert descent(warm_up=0.0).rate() == 0.1


def test_a_gradient_above_the_bound_steps_as_the_same_one_of_the_bound_does():
    # The first step does not depend on the gradient's size; the second does, through Adam's averages.
    clipped, reference = descent(clip=1.0), descent(clip=math.inf)
    for one in (clipped, reference):
        step(one, 0.06, 0.08)
    far, norm = step(clipped, 300.0, 400.0)
    assert far == pytest.approx(step(reference, 0.6, 0.8)[0], rel=1e-4)
    assert norm == pytest.approx(500.0)  # the norm before clipping


def test_a_gradient_below_the_bound_is_left_as_it_is():
    clipped, reference = descent(clip=1.0), descent(clip=math.inf)
    for gradients in ((0.3, 0.4), (0.03, 0.04)):
        assert step(clipped, *gradients) == step(reference, *gradients)
