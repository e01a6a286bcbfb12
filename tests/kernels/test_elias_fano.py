import math

import pytest
import torch

from reallm.kernels.elias_fano import pack_positions, positions_nbytes, unpack_positions


@pytest.mark.parametrize(
    ("count", "places"), [(1, 2), (1, 1 << 22), (3, 5), (9, 10), (6, 576), (500, 1000), (700, 1 << 20)]
)
def test_positions_come_back_and_take_the_bytes_said(count, places):
    drawn = torch.randperm(places, generator=torch.Generator().manual_seed(0))[:count].sort().values
    for positions in (drawn, torch.arange(count), torch.arange(places - count, places)):
        packed = pack_positions(positions, places)
        assert len(packed) == positions_nbytes(count, places)
        assert torch.equal(unpack_positions(packed, count, places), positions)


@pytest.mark.parametrize("share", [0.01, 0.03, 0.2])
def test_a_position_takes_at_most_0_7_bits_more_than_any_code_must(share):
    places = 1 << 20
    count = int(share * places)
    least = (math.lgamma(places + 1) - math.lgamma(count + 1) - math.lgamma(places - count + 1)) / math.log(2)
    assert 8 * positions_nbytes(count, places) < least + 0.7 * count
