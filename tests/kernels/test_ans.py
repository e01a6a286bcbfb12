"""The stream against a decoder written from docs/artifact.md alone: Python integers, no code of the library."""

import numpy as np
import pytest

from reallm.errors import FormatError
from reallm.kernels.ans import TOTAL, AnsReader, AnsWriter, normalize_frequencies
from reallm.kernels.e8_stream import are_lattice_points, frequency_table, largest_code, read_codes, write_codes


class Stack:
    def __init__(self, words):
        self.words = [int(word) for word in words]
        while self.words and not self.words[-1]:
            self.words.pop()
        self.state = 0
        for _ in range(2):
            if self.words:
                self.state = (self.state << 32) | self.words.pop()

    def read(self, frequencies):
        low, slot, symbol = 0, self.state % TOTAL, 0
        while slot >= low + frequencies[symbol]:
            low += frequencies[symbol]
            symbol += 1
        frequency = frequencies[symbol]
        self.state = self.state // TOTAL * frequency + slot - low
        if self.state < 2**32 and self.words:
            self.state = (self.state << 32) | self.words.pop()
        return symbol


def frequencies_by_the_page(table, modulus, residue):
    levels = len(table) // 2
    weights = [(16 + b % 16) * 2 ** (b // 16) if b else 0 for b in map(int, table)]
    kept = [w if (v - levels) % modulus == residue or v in (0, 2 * levels) else 0 for v, w in enumerate(weights)]
    shares = [w * TOTAL // sum(kept) for w in kept]
    shares[shares.index(max(shares))] += TOTAL - sum(shares)
    return shares


def read_by_the_page(words, rows, columns, table):
    stack, levels, codes = Stack(words), len(table) // 2, np.zeros((rows, columns), np.int64)

    def run(places, modulus, residue):
        if not places:
            return
        frequencies = frequencies_by_the_page(table, modulus, residue)
        for place in places:
            codes[place] = stack.read(frequencies) - levels
        for place in places:
            if abs(codes[place]) == levels:
                codes[place] += np.sign(codes[place]) * stack.read([256] * 65536)

    firsts = [(row, column) for row in range(0, rows // 8 * 8, 8) for column in range(columns)]
    run(firsts, 1, 0)
    for parity in range(2):
        run([(r + i, c) for r, c in firsts if codes[r, c] % 2 == parity for i in range(1, 7)], 2, parity)
    for residue in range(4):
        run([(r + 7, c) for r, c in firsts if -codes[r : r + 7, c].sum() % 4 == residue], 4, residue)
    run([(r, c) for r in range(rows // 8 * 8, rows) for c in range(columns)], 2, 0)
    return codes


def points(rows, columns, spread, seed=0):
    generator = np.random.default_rng(seed)
    codes = 2 * np.round(generator.normal(size=(rows, columns)) * spread).astype(np.int64)
    blocks = codes[: rows // 8 * 8].reshape(rows // 8, 8, columns)
    blocks += generator.integers(0, 2, (len(blocks), 1, columns))
    blocks[:, 7] += -blocks.sum(1) % 4
    return codes


def written(codes, table):
    writer = AnsWriter()
    write_codes(writer, codes, table)
    return writer.words()


@pytest.mark.parametrize(("rows", "columns"), [(16, 30), (21, 10), (5, 4), (8, 1), (3, 0)])
@pytest.mark.parametrize("levels", [1, 4, 31, 127])
def test_a_stream_is_read_back_by_the_library_and_by_the_page(rows, columns, levels):
    codes = points(rows, columns, 3.0)
    assert are_lattice_points(codes)
    table = frequency_table(codes, levels)
    words = written(codes, table)
    reader = AnsReader(np.concatenate([words, np.zeros(3, np.uint32)]))
    np.testing.assert_array_equal(read_codes(reader, rows, columns, table), codes)
    assert reader.is_empty
    np.testing.assert_array_equal(read_by_the_page(words, rows, columns, table), codes)


def test_the_largest_code_is_written_and_zeros_take_nothing():
    codes = np.zeros((8, 6), np.int64)
    assert not len(written(codes, frequency_table(codes, 7)))
    codes[0, 0] = codes[1, 1] = 4 * (largest_code(7) // 4)
    table = frequency_table(codes, 7)
    np.testing.assert_array_equal(read_codes(AnsReader(written(codes, table)), 8, 6, table), codes)


def test_a_stream_takes_its_entropy():
    codes = points(64, 1000, 2.0)
    table = frequency_table(codes, 31)
    shares = np.unique(codes, return_counts=True)[1] / codes.size
    entropy = -(shares * np.log2(shares)).sum() - 1  # parity saves almost one bit per weight
    assert 32 * len(written(codes, table)) / codes.size < entropy + 0.01


def test_damaged_words_end_in_other_codes_or_an_error_and_a_table_without_codes_in_an_error():
    codes = points(16, 50, 3.0)
    table = frequency_table(codes, 31)
    words = written(codes, table)
    for seed in range(20):
        bad = np.random.default_rng(seed).integers(0, 2**32, len(words) + seed, dtype=np.uint32)
        reader = AnsReader(bad)
        assert read_codes(reader, 16, 50, table).shape == codes.shape
        assert not reader.is_empty or len(bad) <= len(words) + 8
    with pytest.raises(FormatError, match="damaged"):
        read_codes(AnsReader(words), 16, 50, np.zeros_like(table))


def test_frequencies_sum_to_the_total_and_keep_every_symbol():
    for weights in ([5], [16, 2**20], [2**21 - 1] * 255, [16] + [31 << 15] * 254, [0, 3, 0]):
        frequencies = normalize_frequencies(np.array(weights))
        assert frequencies.sum() == TOTAL and ((frequencies > 0) == (np.array(weights) > 0)).all()
