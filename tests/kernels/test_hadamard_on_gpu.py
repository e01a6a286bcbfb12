import pytest
import torch

from reallm.kernels import rotate, rotate_back

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("n", [64, 576, 1536, 11008])
def test_a_gpu_rotates_as_a_processor_does(n):
    values = torch.randn(8, n, generator=torch.Generator().manual_seed(n))
    for turn in (rotate, rotate_back):
        torch.testing.assert_close(turn(values.cuda(), 5).cpu(), turn(values, 5), rtol=1e-4, atol=1e-5)
