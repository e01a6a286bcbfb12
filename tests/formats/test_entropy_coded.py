import sys

import pytest
import torch

from reallm.errors import FormatError
from reallm.fit import fit
from reallm.formats import from_spec
from reallm.formats.entropy_coded import EntropyCoded, UnpackedEntropyCoded

SHAPE = (32, 64)
FMT = EntropyCoded(4.0, largest=31, classes=3)


@pytest.fixture
def tensors():
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    return FMT.pack(fit(FMT, weight), SHAPE)


@pytest.mark.parametrize("name", ["codes", "frequencies", "column_classes"])
def test_damaged_bytes_end_in_a_format_error_or_in_finite_weights(tensors, name):
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(40):
        bad = {key: tensor.clone() for key, tensor in tensors.items()}
        flat = bad[name].view(-1)
        place = torch.randint(len(flat), (3,), generator=generator)
        flat[place] = torch.randint(256, (3,), generator=generator, dtype=torch.uint8)
        try:
            assert torch.isfinite(FMT.decode(FMT.unpack(bad, SHAPE), SHAPE)).all()
        except FormatError as error:
            assert "damaged" in str(error)
            refused += 1
    assert refused >= 30


@pytest.mark.parametrize("fill", [0, 1, 255])
def test_a_constant_file_is_refused(tensors, fill):
    with pytest.raises(FormatError, match="damaged"):
        FMT.unpack({name: torch.full_like(tensor, fill) for name, tensor in tensors.items()}, SHAPE)


def test_codes_that_do_not_fit_the_budget_or_the_lattice_are_refused():
    codes = 4 * torch.randint(-30, 30, SHAPE, dtype=torch.int32)
    with pytest.raises(FormatError, match=r"bits=4.0 leaves"):
        FMT.pack(UnpackedEntropyCoded(codes, torch.ones(1)), SHAPE)
    with pytest.raises(FormatError, match="lattice"):
        FMT.pack(UnpackedEntropyCoded(torch.eye(32, 64, dtype=torch.int32), torch.ones(1)), SHAPE)


@pytest.mark.parametrize(
    ("field", "value"), [("bits", 0), ("bits", 17.0), ("bits", float("nan")), ("largest", 128), ("classes", 0)]
)
def test_fields_out_of_range_are_named(field, value):
    with pytest.raises(FormatError, match=f"{field}={value}"):
        from_spec({"format": "entropy_coded", "bits": 2.5, field: value})


def test_a_matrix_too_small_for_its_tables_names_bits():
    with pytest.raises(FormatError, match=r"bits=2.0 is 1 bytes for a matrix of 1 x 5"):
        EntropyCoded(2.0).check((1, 5))


def test_without_the_coder_the_message_names_the_extra(tensors, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(FormatError, match=r'pip install "\.\[entropy\]" in the clone'):
        FMT.unpack(tensors, SHAPE)
