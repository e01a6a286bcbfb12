import pytest
import torch

from reallm.kernels import entries


def gradient(look_up, threads=1):
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 64, (96, 300), generator=draw)
    table = torch.randn(64, 4, generator=draw, requires_grad=True)
    upstream = torch.randn(96, 300, 4, generator=draw)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values = look_up(table, codes)
        values.backward(upstream)
    finally:
        torch.set_num_threads(before)
    return values.detach(), table.grad


def test_entries_and_their_gradient_are_those_of_indexing():
    (values, got), (expected, wanted) = gradient(entries), gradient(lambda table, codes: table[codes])
    assert torch.equal(values, expected)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [2, 4])
def test_the_gradient_is_the_same_with_any_number_of_threads(threads):
    assert torch.equal(gradient(entries)[1], gradient(entries, threads)[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_gradient_is_the_same_every_time():
    def on_gpu(table, codes):
        return entries(table.cuda(), codes.cuda()).cpu()

    assert torch.equal(gradient(on_gpu)[1], gradient(on_gpu)[1])
    torch.testing.assert_close(gradient(on_gpu)[1], gradient(entries)[1], rtol=1e-4, atol=1e-4)
