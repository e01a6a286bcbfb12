"""AdamW with warm-up and cosine decay, gradient clipping, a check for non-finite gradients, and a resumable state."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from reallm.errors import ArtifactError
from reallm.formats import Tensors
from reallm.tuning.distributed import ProcessGroup

_BETAS = (0.9, 0.95)


class Diverged(Exception):
    """The loss or its gradient is not finite; the parameters are unchanged."""


class Optimizer:
    """AdamW on named parameters for a fixed number of steps; no weight decay: scales are not near 0."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        steps: int,
        learning_rate: float,
        warm_up: float,
        clip: float,
        workers: ProcessGroup,
    ) -> None:
        self.parameters, self.steps, self.learning_rate, self.clip = parameters, steps, learning_rate, clip
        self.warm_up = math.ceil(warm_up * steps)
        self.workers = workers
        self.done = 0
        self.adam = torch.optim.AdamW(list(parameters.values()), lr=learning_rate, betas=_BETAS, weight_decay=0.0)

    def rate(self) -> float:
        """Return the learning rate of the next step: linear warm-up, then cosine decay."""
        if self.done < self.warm_up:
            return self.learning_rate * (self.done + 1) / self.warm_up
        share = (self.done - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))

    def step(self) -> float:
        """Take a step along the gradients summed over all processes; return their norm before clipping.

        Errors: Diverged, before anything changes.
        """
        for parameter in self.parameters.values():
            if parameter.grad is None:  # an expert that no token reached
                parameter.grad = torch.zeros_like(parameter)
        self.workers.all_reduce(parameter.grad for parameter in self.parameters.values())
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.clip).item()
        if not math.isfinite(norm):
            self.adam.zero_grad()
            raise Diverged
        for group in self.adam.param_groups:
            group["lr"] = self.rate()
        self.adam.step()
        self.adam.zero_grad()
        self.done += 1
        return norm

    def state_dict(self) -> Tensors:
        """Return copies of everything the next step depends on."""
        tensors = {"steps": torch.tensor([self.done])}
        for name, parameter in self.parameters.items():
            tensors[f"parameter/{name}"] = parameter.detach().cpu().clone()
            for moment in ("exp_avg", "exp_avg_sq"):
                if parameter in self.adam.state:
                    tensors[f"{moment}/{name}"] = self.adam.state[parameter][moment].cpu().clone()
        return tensors

    def layout(self) -> Tensors:
        """Return names, shapes and dtypes of `state_dict` after a step."""
        tensors = {
            f"{kind}/{n}": p for kind in ("parameter", "exp_avg", "exp_avg_sq") for n, p in self.parameters.items()
        }
        return {"steps": torch.empty(1, dtype=torch.int64, device="meta"), **tensors}

    def load_state_dict(self, tensors: Tensors) -> None:
        """Restore from `state_dict`.

        Errors: ArtifactError if the saved step is outside this run.
        """
        self.done = int(tensors["steps"])
        if not 0 < self.done <= self.steps:
            raise ArtifactError(f"the saved state is of step {self.done} of {self.steps}; remove the work folder")
        restore(self.parameters, {n: tensors[f"parameter/{n}"] for n in self.parameters})
        for name, parameter in self.parameters.items():
            if f"exp_avg/{name}" in tensors:
                self.adam.state[parameter] = {
                    "step": torch.tensor(float(self.done)),
                    **{m: tensors[f"{m}/{name}"].to(parameter.device) for m in ("exp_avg", "exp_avg_sq")},
                }


def snapshot(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return copies of the parameters on the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}


def restore(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Copy values into the parameters in place."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
