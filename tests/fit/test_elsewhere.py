"""Fits of neural formats on a device that is not the CPU, on machines that have no other.

Tensors of `Elsewhere` say that they are on the device "meta" and hold their numbers on the CPU. As on a GPU they refuse
to meet tensors of the CPU; unlike on "meta" itself all values are there, and so all decisions that a fit takes by them.
Whether generators are of the right device is not seen.
"""

import contextlib

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from reallm.fit import Objective, capture_fit_input, fit, relative_error, train_shared_decoder
from reallm.formats import from_spec, use_shared_decoders

DEVICE = torch.device("meta")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")  # indices may come from the CPU
SHAPE = (24, 40)


class Elsewhere(Tensor):
    @staticmethod
    def __new__(cls, held):
        like = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return Tensor._make_wrapper_subclass(cls, held.shape, device=DEVICE, **like)

    def __init__(self, held):
        self.held = held

    def tolist(self):
        return self.held.tolist()

    def numpy(self, **_):
        raise TypeError("a tensor elsewhere is no numpy array")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatched(func, args, kwargs or {})


class Everywhere(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatched(func, args, kwargs or {})


class Generator(torch.Generator):
    """One of the CPU wherever it is asked for."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        pass


def dispatched(func, args, kwargs):
    name = func._schema.name
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    there = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    if there and name != "aten::copy_":
        indices = {id(value) for value in tree_leaves(args[1])} if name in INDEXING else set()
        strangers = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim() and id(t) not in indices]
        if strangers or (indices and not isinstance(args[0], Elsewhere)):
            raise RuntimeError(f"{name}: tensors of two devices meet")
    wanted = kwargs.get("device")
    out_there = there if wanted is None else torch.device(wanted) == DEVICE
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if wanted is not None:
        kwargs["device"] = torch.device("cpu")
    args, kwargs = tree_map(_held, (args, kwargs))
    found = func(*args, **kwargs)
    if name.endswith("_") and tensors and found is args[0]:
        return tensors[0]
    return (
        tree_map(lambda value: Elsewhere(value) if isinstance(value, Tensor) else value, found) if out_there else found
    )


def _held(value):
    return value.held if isinstance(value, Elsewhere) else value


@pytest.fixture
def elsewhere(monkeypatch):
    """A context in which tensors can be `.to(DEVICE)`."""
    monkeypatch.setattr(torch, "Generator", Generator)
    return Everywhere


VECTORS = {"format": "codebook", "vector_dim": 2, "index_bits": 4}
CODEWORD = {"format": "codeword", "index_bits": 5, "hidden": 2}
CONV = {"format": "conv_latents", "base": VECTORS, "width": 4, "steps": 11}
LEARNED = {"format": "linear_latents", "base": VECTORS, "transform": "learned"}
FORMATS = {
    "codeword": CODEWORD,
    "rotated, shared codeword": {"format": "rotated", "base": {**CODEWORD, "shared": "x"}},
    "conv": CONV,
    "shared conv": {**CONV, "shared": "x"},
    "conv with an encoder": {**CONV, "method": "encoder"},
    "learned": LEARNED,
    "shared learned": {**LEARNED, "shared": "x"},
    "dct": {**LEARNED, "transform": "dct"},
    "one book": {"format": "additive", "books": 1, "index_bits": 4},
    "rotated e8": {"format": "rotated", "base": {"format": "e8", "bits": 2}},
    "rotated trellis": {"format": "rotated", "base": {"format": "trellis", "bits": 2, "state_bits": 6}},
}


def outcome(fmt, weight, objective):
    shared_decoders = {}
    if fmt.shared_decoders():
        fit_inputs = [capture_fit_input(fmt, weight * size, Objective.plain(weight), 0) for size in (1, 2)]
        shared_decoders["x"] = fit_inputs[0].fmt.pack_decoder(
            train_shared_decoder(fit_inputs[0].fmt, fit_inputs, str(weight.device))
        )
    with use_shared_decoders(
        {name: {key: t.cpu() for key, t in table.items()} for name, table in shared_decoders.items()}
    ):
        tensors = fmt.pack(fit(fmt, weight, objective), SHAPE)
        return tensors, relative_error(weight, fmt.decode(fmt.unpack(tensors, SHAPE), SHAPE))


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_a_fit_on_another_device_leaves_everything_there_and_finds_the_same(elsewhere, name, calibrated):
    fmt, generator = from_spec(FORMATS[name]), torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(SHAPE, generator=generator), torch.randn(100, SHAPE[1], generator=generator)
    found = []
    for there in (False, True):
        with torch.no_grad(), elsewhere() if there else contextlib.nullcontext():
            w, x = (tensor.to(DEVICE) if there else tensor for tensor in (weight, inputs))
            found.append(
                outcome(fmt, w, Objective.output_error(x.T @ x / len(x)) if calibrated else Objective.plain(w))
            )
    (_, here), (tensors, error) = found
    assert all(isinstance(tensor, Elsewhere) for tensor in tensors.values())
    # Hadamard transforms go another way where there is no cache to keep to, and k-means magnifies the last bit.
    assert error == (pytest.approx(here, rel=0.03) if fmt.name == "rotated" else here)


def test_devices_do_not_mix_there(elsewhere):
    with elsewhere():
        tensor = torch.ones(3, 2).to(DEVICE)
        with pytest.raises(RuntimeError, match="two devices"):
            tensor + torch.ones(3, 2)
        assert tensor[torch.tensor([0, 1])].sum().item() == 4
