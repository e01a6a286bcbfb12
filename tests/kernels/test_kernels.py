import math

import pytest
import torch

from reallm.kernels import (
    hadamard,
    nearest_entry,
    nearest_level,
    pack_bits,
    packed_nbytes,
    rotate,
    rotate_back,
    segment_sum,
    unpack_bits,
)


@pytest.mark.parametrize("bits", range(1, 18))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_codes_come_back_from_exactly_the_announced_bytes(bits, count):
    generator = torch.Generator().manual_seed(bits * 1000 + count)
    codes = torch.randint(2**bits, (count,), generator=generator, dtype=torch.int32)
    packed = pack_bits(codes, bits)
    assert packed.nbytes == packed_nbytes(count, bits)
    assert torch.equal(unpack_bits(packed, bits, count), codes)


def test_packed_bytes_are_as_specified():
    # docs/artifact.md: first code in the lowest bits, bytes in order. 3-bit codes 1..8 (mod 8):
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.int32)
    word = sum(int(code) << (3 * i) for i, code in enumerate(codes))
    assert pack_bits(codes, 3).tolist() == list(word.to_bytes(3, "little"))


def test_twelve_bit_codes_are_a_plane_of_low_bytes_and_a_packed_plane_of_the_rest():
    codes = torch.tensor([0xABC, 0x123], dtype=torch.int32)
    assert pack_bits(codes, 12).tolist() == [0xBC, 0x23, 0x1A]


def test_nearest_entry_is_the_brute_force_one():
    generator = torch.Generator().manual_seed(0)
    vectors, codebook = torch.randn(500, 3, generator=generator), torch.randn(37, 3, generator=generator)
    brute = torch.cdist(vectors, codebook).argmin(1)
    assert torch.equal(nearest_entry(vectors, codebook).long(), brute)


def test_nearest_level_is_the_brute_force_one():
    values, levels = torch.linspace(-2, 2, 101), torch.tensor([-1.0, -0.2, 0.0, 0.7])
    brute = (values[:, None] - levels).abs().argmin(1)
    assert torch.equal(nearest_level(values, levels).long(), brute)


def test_sums_by_code_are_those_of_a_loop():
    values, codes = torch.randn(50, 3), torch.randint(7, (50,))
    expected = torch.stack([values[codes == code].sum(0) for code in range(9)])
    torch.testing.assert_close(segment_sum(values, codes, 9), expected)


def test_the_nearest_entry_by_importance_is_the_brute_force_one():
    generator = torch.Generator().manual_seed(0)
    vectors, codebook = torch.randn(500, 4, generator=generator), torch.randn(17, 4, generator=generator)
    importance = torch.rand(500, 4, generator=generator)
    distances = ((vectors[:, None] - codebook) ** 2 * importance[:, None]).sum(2)
    assert torch.equal(nearest_entry(vectors, codebook, importance).long(), distances.argmin(1))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_sums_by_code_do_not_depend_on_the_order(size):
    generator = torch.Generator().manual_seed(0)
    values, codes = torch.randn(5000, 2, generator=generator) * size, torch.randint(7, (5000,), generator=generator)
    shuffled = torch.randperm(5000, generator=generator)
    assert torch.equal(segment_sum(values, codes, 7), segment_sum(values[shuffled], codes[shuffled], 7))


SIZES = [1, 2, 3, 5, 12, 37, 64, 576, 1536, 11008]


@pytest.mark.parametrize("n", SIZES)
def test_rotating_keeps_lengths_and_can_be_undone(n):
    values = torch.randn(3, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = rotate(values, seed=5)
    torch.testing.assert_close(turned.norm(dim=1), values.norm(dim=1))
    torch.testing.assert_close(rotate_back(turned, seed=5), values)


@pytest.mark.parametrize("n", [64, 576, 1536, 11008])
def test_rotating_spreads_an_outlier(n):
    one = torch.zeros(1, n)
    one[0, n // 3] = 1
    assert rotate(one, seed=1).abs().max() < 2 / n**0.5


@pytest.mark.parametrize("n", [1, 2, 9, 64, 86, 576, 1536, 4096, 11008])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_with_factors_transform_as_sums_and_differences_do(n, transposed):
    values = torch.randn(3, n, dtype=torch.float64)
    torch.testing.assert_close(
        hadamard.kronecker_transform(values, transposed), hadamard._transform(values, transposed)
    )
    sizes = [len(factor) for factor in hadamard.kronecker_factors(n, values.device, values.dtype)]
    assert math.prod(sizes) == n and max(sizes) <= max(64, n // (n & -n))


def test_another_seed_rotates_otherwise():
    values = torch.randn(1, 96, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(rotate(values, 1), rotate(values, 2))
    assert not torch.allclose(rotate(values, 1), rotate_back(values, 1))
