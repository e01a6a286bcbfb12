"""The rate in the loss of convolutional decoders: bits as the coder counts them, and less error in the same bytes."""

import math

import pytest
import torch

from reallm.errors import FormatError
from reallm.fit import Objective, capture_fit_input, fit, relative_error, train_shared_decoder
from reallm.fit.latent_rate import LatentRate
from reallm.formats import from_spec, to_spec, use_shared_decoders
from reallm.formats.entropy_coded import EntropyCoded, UnpackedEntropyCoded

pytest.importorskip("constriction")

SHAPE = (64, 96)
BASE = {"format": "entropy_coded", "bits": 2.5, "largest": 15}
CONV = {"format": "conv_latents", "width": 2, "steps": 40, "base": BASE}


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_low_rank():
    return drawn(SHAPE[0], 2, seed=3) @ drawn(2, SHAPE[1], seed=4) + 0.5 * drawn(*SHAPE)


def fitted(weight, objective=None, **more):
    fmt = from_spec({**CONV, **more})
    return fmt, fit(fmt, weight, objective)


def error_of(weight, **more):
    fmt, unpacked = fitted(weight, **more)
    return relative_error(weight, fmt.decode(unpacked, tuple(weight.shape)))


@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("bits", [1.5, 2.5])
def test_bits_of_codes_are_those_of_the_coded_words(bits, classes):
    weight = drawn(256, 256).pow(3) * torch.logspace(-1, 0, 256)
    fmt = EntropyCoded(bits, classes=classes)
    unpacked = fit(fmt, weight)
    words = len(fmt.encode_codes(unpacked.codes.numpy())[0])
    bits = LatentRate.estimate(fmt, unpacked).bits(unpacked.codes * unpacked.step).item()
    assert bits == pytest.approx(32 * words, rel=0.08)


def test_the_density_is_learned_where_codes_are_not_around_zero():
    codes = 8 * torch.ones(64, 64, dtype=torch.int32) + 2 * (drawn(64, 64) > 0).int()
    fmt, unpacked = EntropyCoded(2.0), UnpackedEntropyCoded(codes, torch.ones(1))
    first = LatentRate.estimate(fmt, unpacked)
    again = LatentRate.estimate(fmt, unpacked, first)
    bits = [rate.bits(codes.float()).item() / codes.numel() for rate in (first, again)]
    assert bits[1] < bits[0] < 4
    assert again.bits(codes.float() - 16) > 2 * again.bits(codes.float())


def test_bits_pull_latents_towards_what_is_probable():
    weight = drawn(64, 64)
    fmt = EntropyCoded(3.0)
    rate = LatentRate.estimate(fmt, fit(fmt, weight))
    latents = torch.tensor([[-2.0, -0.5, 0.5, 2.0]]).requires_grad_()
    columns = LatentRate(rate.mixtures, torch.zeros(4, dtype=torch.long), rate.step)
    (gradient,) = torch.autograd.grad(columns.bits(latents), latents)
    assert (gradient.sign() == latents.sign()).all()
    assert gradient[0, 3] > gradient[0, 2]


@pytest.mark.parametrize(("weight", "most"), [(drawn(*SHAPE).pow(3), 0.92), (of_low_rank(), 0.96)])
def test_training_by_rate_has_less_error_in_the_same_bytes(weight, most):
    start, without, with_rate = (error_of(weight, **more) for more in ({"rate": 1, "steps": 0}, {}, {"rate": 1}))
    assert with_rate < most * without
    assert with_rate < 0.985 * start


def test_every_class_of_columns_has_its_own_density():
    weight = drawn(*SHAPE) * torch.logspace(-0.7, 0, SHAPE[1])
    base = {**BASE, "classes": 4}
    assert error_of(weight, base=base, rate=1) < 0.985 * error_of(weight, base=base, rate=1, steps=0)


def test_the_price_of_a_bit_does_not_depend_on_the_size_of_weights():
    small, large = (error_of(size * of_low_rank(), rate=1, steps=12) for size in (1, 64))
    assert small == pytest.approx(large, rel=1e-4)


def test_rows_of_other_sizes_take_other_bits():
    weight = drawn(*SHAPE) * torch.logspace(-1, 0, SHAPE[0])[:, None]
    assert error_of(weight, rate=1, steps=0) < 0.92 * error_of(weight, steps=0)


def test_a_full_hessian_guides_training_by_rate():
    weight, inputs = of_low_rank(), drawn(500, SHAPE[1], seed=1) @ drawn(SHAPE[1], SHAPE[1], seed=2) / 10
    objective = Objective.output_error(inputs.T @ inputs / 500)
    errors = []
    for goal in (None, objective):
        fmt, unpacked = fitted(weight, goal, rate=1, steps=20)
        errors.append(objective.error(weight, fmt.decode(unpacked, SHAPE)))
    assert errors[1] < 0.97 * errors[0]


def test_bits_of_latents_are_in_the_loss(monkeypatch):
    fmt, with_bits = fitted(drawn(*SHAPE), rate=1, steps=12)
    monkeypatch.setattr(LatentRate, "bits", lambda self, latents: 0 * latents.sum())
    without_bits = fitted(drawn(*SHAPE), rate=1, steps=12)[1]
    assert not torch.equal(with_bits.base.codes, without_bits.base.codes)


@pytest.mark.parametrize("method", ["auto_decoder", "encoder"])
def test_training_by_rate_gives_the_same_bytes_again(method):
    found = []
    for _ in range(2):
        fmt, unpacked = fitted(drawn(*SHAPE), rate=1, steps=12, method=method)
        found.append(fmt.pack(unpacked, SHAPE))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_the_rate_changes_no_layout_and_no_decoder():
    weight = drawn(*SHAPE)
    fmt, unpacked = fitted(weight, rate=1, steps=4)
    plain = from_spec(CONV)
    tensors = fmt.pack(unpacked, SHAPE)
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
        name: (t.shape, t.dtype) for name, t in plain.layout(SHAPE).items()
    }
    assert torch.equal(plain.decode(plain.unpack(tensors, SHAPE), SHAPE), fmt.decode(unpacked, SHAPE))


def test_specs_without_a_rate_are_read_as_before():
    fmt = from_spec(CONV)
    assert fmt.rate == 0
    assert from_spec(to_spec(from_spec({**CONV, "rate": 1}))).rate == 1


def test_a_shared_decoder_is_trained_by_rate():
    fmt = from_spec({**CONV, "shared": "x", "rate": 1, "steps": 12})
    weights = [drawn(*SHAPE, seed=seed) for seed in range(2)]
    fit_inputs = [capture_fit_input(fmt, weight, Objective.plain(weight), 0) for weight in weights]
    with use_shared_decoders({"x": fmt.pack_decoder(train_shared_decoder(fmt, fit_inputs, "cpu"))}):
        for weight in weights:
            assert relative_error(weight, fmt.decode(fit(fmt, weight), SHAPE)) < 0.08


@pytest.mark.parametrize(
    ("size", "rate"), [(0.0, 1), (1e-30, 1), (1e-12, 0), (1e-12, 1), (1e-6, 1), (1e30, 0), (1e30, 1)]
)
def test_sizes_that_float16_scales_cannot_hold_stay_finite(size, rate):
    weight = drawn(16, 24) * size
    fmt, unpacked = fitted(weight, rate=rate, steps=11)
    assert torch.isfinite(fmt.decode(unpacked, (16, 24))).all()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"rate": -0.5}, "rate=-0.5 is not in 0"),
        ({"rate": math.nan}, "rate=nan is not in 0"),
        ({"rate": 1, "base": {"format": "uniform", "bits": 2}}, "rate=1 needs base=entropy_coded.*uniform"),
    ],
)
def test_a_rate_that_cannot_be_is_refused(more, said):
    with pytest.raises(FormatError, match=said):
        from_spec({**CONV, **more})
