"""Compressed modules act as the modules that they replace."""

import copy

import pytest
import torch
from torch import nn

from reallm.fit import fit
from reallm.formats.low_rank_plus import LowRankPlus
from reallm.formats.uniform import Uniform
from reallm.hf import CompressedEmbedding, CompressedExperts, CompressedLinear, TiedLinear
from reallm.hf.modules import CompressedExpert

FMT = LowRankPlus(base=Uniform(bits=4, group_size=8), rank=2)


def fill(module, weight):
    """Fill the module with the packed tensors of a fitted weight, on the CPU."""
    module = module.to_empty(device="cpu")
    packed = module.fmt.pack(fit(module.fmt, weight, seed=0), module.shape)
    for name, tensor in packed.items():
        module.get_buffer(name).copy_(tensor)
    return module


def linear(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    weight = torch.randn(6, 16)
    parameter = nn.Parameter(torch.randn(6, dtype=dtype)) if bias else None
    module = CompressedLinear(FMT, (6, 16), dtype, parameter)
    bias_values = None if parameter is None else parameter.detach().clone()
    module = fill(module, weight)
    if bias_values is not None:
        module.bias.data.copy_(bias_values)
    return module


def test_keys_of_the_state_dict_are_the_local_names_and_the_bias():
    assert set(linear().state_dict()) == {*FMT.layout((6, 16)), "bias"}


def test_forward_is_the_product_with_the_decoded_weight_in_both_modes():
    module, x = linear(), torch.randn(3, 2, 16)
    expected = x @ module.decode().T + module.bias
    torch.testing.assert_close(module(x), expected)
    module.decode_once()
    torch.testing.assert_close(module(x), expected)


def test_gradients_reach_the_input_and_the_bias():
    module, x = linear(), torch.randn(3, 16, requires_grad=True)
    module(x).sum().backward()
    assert x.grad.abs().sum() > 0 and module.bias.grad is not None


def test_rows_plus_a_residual_are_decoded_without_the_rest(monkeypatch):
    weight = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    module = fill(CompressedEmbedding(FMT, (12, 16), torch.float32, nn.Embedding(12, 16)), weight)
    whole, decoded = module.decode(), []
    decode = Uniform.decode
    monkeypatch.setattr(
        Uniform, "decode", lambda fmt, unpacked, shape: decoded.append(shape) or decode(fmt, unpacked, shape)
    )
    torch.testing.assert_close(module(torch.tensor([[3, 3], [7, 3]])), whole[torch.tensor([[3, 3], [7, 3]])])
    assert decoded == [(2, 16)]


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
@pytest.mark.parametrize("decoded", [False, True])
def test_casting_a_module_leaves_the_stored_tensors_alone(cast, decoded):
    module = linear()
    if decoded:
        module.decode_once()
    before = {name: tensor.clone() for name, tensor in module.packed_tensors().items()}
    module = cast(module)
    for name, tensor in module.packed_tensors().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    dtype = module.bias.dtype
    assert dtype != torch.float32
    assert module(torch.randn(2, 16, dtype=dtype)).dtype == dtype


def test_decoding_once_adds_nothing_to_what_is_saved():
    module = linear()
    before = set(module.state_dict())
    module.decode_once()
    assert set(module.state_dict()) == before


@pytest.mark.parametrize("decoded", [False, True])
def test_an_embedding_looks_up_the_rows_of_the_decoded_matrix(decoded):
    original = nn.Embedding(6, 16, padding_idx=1, device="meta")
    module = fill(CompressedEmbedding(FMT, (6, 16), torch.float32, original), torch.randn(6, 16))
    if decoded:
        module.decode_once()
    ids = torch.tensor([[0, 5, 5], [1, 2, 0]])
    torch.testing.assert_close(module(ids), module.decode()[ids])


def test_an_embedding_with_a_forward_of_its_own_keeps_it():
    class Shifted(nn.Embedding):
        def __init__(self):
            super().__init__(6, 16, padding_idx=5)
            self.shift = 3.0

        def forward(self, ids):
            return super().forward(ids) + self.shift

    module = fill(CompressedEmbedding(FMT, (6, 16), torch.float32, Shifted()), torch.randn(6, 16))
    ids = torch.tensor([[0, 3, 3]])
    torch.testing.assert_close(module(ids), module.decode()[ids] + 3.0)
    plain = module.dense_module(torch.float32)
    assert type(plain) is Shifted and plain.padding_idx == 5
    torch.testing.assert_close(plain(ids), module(ids))


def test_a_tied_head_stores_nothing_and_follows_its_owner():
    owner = fill(CompressedEmbedding(FMT, (6, 16), torch.float32, nn.Embedding(6, 16)), torch.randn(6, 16))
    head = TiedLinear(owner)
    assert head.state_dict() == {} and list(head.buffers()) == []
    owner.decode_once()
    assert head.weight.data_ptr() == owner.dense.data_ptr()


def test_a_copied_model_ties_its_own_modules():
    owner = fill(CompressedEmbedding(FMT, (6, 16), torch.float32, nn.Embedding(6, 16)), torch.randn(6, 16))
    pair = copy.deepcopy(nn.ModuleList([owner, TiedLinear(owner)]))
    assert pair[1]._owner[0] is pair[0]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("decoded", [False, True])
def test_torch_functions_get_the_whole_tensor_of_experts(transposed, decoded):
    weights = [fill(CompressedExpert(FMT, (6, 16), torch.float32), torch.randn(6, 16)) for _ in range(3)]
    if decoded:
        for module in weights:
            module.decode_once()
    experts = CompressedExperts(weights, transposed)
    whole = torch.stack([module.decode().T if transposed else module.decode() for module in weights])
    assert experts.shape == whole.shape and experts.ndim == 3 and experts.dtype == whole.dtype and len(experts) == 3
    x = torch.randn(3, 5, whole.shape[1], requires_grad=True)
    for product in (torch.bmm, torch.matmul, lambda a, b: a @ b, lambda a, b: torch.einsum("eni,eio->eno", a, b)):
        torch.testing.assert_close(product(x, experts), product(x, whole))
    product(x, experts).sum().backward()
    assert x.grad.abs().sum() > 0
    assert torch.equal(experts.transpose(1, 2), whole.transpose(1, 2))
    assert torch.equal(torch.stack(list(experts)), whole) and torch.equal(experts[1:], whole[1:])
    assert torch.equal(experts[torch.tensor([2, 0])], whole[[2, 0]]) and torch.equal(experts[torch.tensor(2)], whole[2])
    torch.testing.assert_close(torch.nn.functional.linear(x[0], experts[1].T), x[0] @ whole[1])


def test_an_embedding_with_modules_of_its_own_holds_them_under_their_names():
    class Normed(nn.Embedding):
        def __init__(self):
            super().__init__(6, 16)
            self.embed_norm = nn.LayerNorm(16)
            self.gain = nn.Parameter(torch.full((16,), 2.0))
            self.register_buffer("scale", torch.tensor(3.0), persistent=False)

        def forward(self, ids):
            return self.embed_norm(super().forward(ids)) * self.gain * self.scale

    original = Normed()
    module = fill(CompressedEmbedding(FMT, (6, 16), torch.float32, original), torch.randn(6, 16))
    others = set(original.state_dict()) - {"weight"}
    assert others == {"embed_norm.weight", "embed_norm.bias", "gain"}
    assert others == set(module.state_dict()) - set(FMT.layout((6, 16)))
    module.wrapped.scale.fill_(3.0)  # as the family's initialisation does after loading
    nn.init.normal_(module.embed_norm.bias)
    nn.init.normal_(module.embed_norm.weight)  # as a loader replaces the tensor
    module.gain = nn.Parameter(torch.randn(16))
    ids = torch.tensor([[0, 3, 3]])
    expected = module.embed_norm(module.decode()[ids]) * module.gain * 3.0
    torch.testing.assert_close(module(ids), expected)
    module(ids).sum().backward()
    assert module.gain.grad is not None and module.embed_norm.bias.grad is not None
    plain = module.dense_module(torch.float32)
    assert set(plain.state_dict()) == set(original.state_dict())
    torch.testing.assert_close(plain(ids), expected)
