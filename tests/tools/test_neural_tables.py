"""Tables of neural results: gains over vector quantization, and over the controls."""

from neural_tables import neural_tables

RUN = {"commit": "a" * 40, "machine": "x86_64 CPU", "command": "python benchmarks/neural.py"}


def row(name, bits, vq_bits, source="original", role="v", block=0, group="c", parameters=10):
    return {
        "name": name, "group": group, "role": role, "block": block, "source": source, "bits": bits,
        "vq_bits": vq_bits, "decoder_parameters": parameters,
    }  # fmt: skip


def tables(*rows):
    model = {"name": "nets", "bits": 2.0, "decoder_bytes": 2809, "perplexity": 47.25, "calibrated": True}
    return neural_tables({"runs": [RUN], "end_to_end": [model], "matrices": list(rows)})


def test_a_gain_is_the_mean_over_originals_and_controls_are_compared_on_their_own_matrices():
    text = tables(
        row("net", 2.0, 2.5),
        row("net", 3.0, 2.9, role="q"),
        row("net", 2.0, 2.1, source="shuffled"),
        row("net", 2.0, 2.7, source="noise", block=9),
    )
    assert "| net | 10 | 2.50 | +0.200 | 2 | +0.400 (1) | – |" in text
    assert "| nets | 2.000 | 2,809 | 47.25 |" in text


def test_arms_that_plain_vectors_do_not_reach_are_left_out_and_the_best_come_first():
    text = tables(
        row("beyond", 2.0, None), row("poor", 2.0, 1.0), row("good", 2.0, 2.2), row("vq", 2.0, 2.0, group="vq")
    )
    assert "beyond" not in text and "| vq |" not in text
    assert text.index("| good |") < text.index("| poor |")
