import math
from types import SimpleNamespace

import pytest
import torch

from reallm.errors import SourceError, TextError
from reallm.evaluate import perplexity
from reallm.evaluate.perplexity import evaluate, windows

VOCAB = 50


class Table(torch.nn.Module):
    """A language model whose next-token logits are looked up by position and token."""

    def __init__(self, seed, vocab=VOCAB, positions=64):
        super().__init__()
        table = torch.randn(positions, vocab, vocab, generator=torch.Generator().manual_seed(seed)) * 2
        self.register_buffer("table", table)
        self.config = SimpleNamespace(vocab_size=vocab, max_position_embeddings=positions)
        self.modes = []

    def forward(self, input_ids, use_cache):
        self.modes.append(self.training)
        positions = torch.arange(input_ids.shape[1])
        return SimpleNamespace(logits=self.table[positions, input_ids])


def some_tokens(count, seed=0):
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def by_hand(model, reference, token_ids, context, bos=None):
    """Return nll, KL and top-1 agreement of every scored token, computed in float64, one at a time."""
    step = context - (bos is not None)
    rows = []
    for start in range(0, len(token_ids) - step + 1, step):
        window = ([] if bos is None else [bos]) + token_ids[start : start + step].tolist()
        for position in range(context - 1):
            p = model.table[position, window[position]].double().softmax(0)
            q = reference.table[position, window[position]].double().softmax(0)
            kl = (q * (q / p).log()).sum().item()
            rows.append((-math.log(p[window[position + 1]]), kl, float(p.argmax() == q.argmax())))
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("bos", [None, 3])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_figures_are_those_of_scoring_each_token_by_hand(bos, batch_size):
    model, reference, token_ids = Table(1), Table(2), some_tokens(75)
    expected = by_hand(model, reference, token_ids, 16, bos)
    found = evaluate(model, token_ids, 16, bos=bos, reference=reference, batch_size=batch_size)
    assert found.tokens == len(expected) == found.windows * 15
    assert (found.nll, found.kl, found.top1) == pytest.approx(expected.mean(0).tolist(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected[:, 0].mean().item()), rel=1e-5)


def test_the_figures_do_not_depend_on_how_many_rows_are_scored_at_a_time(monkeypatch):
    whole = evaluate(Table(1), some_tokens(75), 16, reference=Table(2))
    monkeypatch.setattr(perplexity, "CHUNK_VALUES", 7 * VOCAB)
    pieces = evaluate(Table(1), some_tokens(75), 16, reference=Table(2))
    assert (pieces.nll, pieces.kl, pieces.top1) == pytest.approx((whole.nll, whole.kl, whole.top1))


def test_a_real_model_scores_as_its_own_loss_says(tiny_llama):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    token_ids = torch.randint(512, (3 * 32 + 5,), generator=torch.Generator().manual_seed(0))
    losses = [model(w[None], labels=w[None]).loss.item() for w in token_ids[:96].split(32)]
    found = evaluate(model, token_ids, 32)
    assert (found.windows, found.tokens) == (3, 93)
    assert found.nll == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_a_model_has_no_distance_to_itself():
    found = evaluate(Table(1), some_tokens(40), 10, reference=Table(1))
    assert found.kl == pytest.approx(0, abs=1e-7) and found.top1 == 1


def test_without_a_reference_there_is_no_distance():
    found = evaluate(Table(1), some_tokens(40), 10)
    assert found.kl is None and found.top1 is None


def test_windows_do_not_overlap_and_the_rest_is_dropped():
    assert windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_with_a_leading_token_no_token_of_the_text_is_lost():
    assert windows(torch.arange(7), 4, bos=99).tolist() == [[99, 0, 1, 2], [99, 3, 4, 5]]


def test_a_text_shorter_than_a_window_is_one_shorter_window():
    assert windows(torch.arange(3), 8).tolist() == [[0, 1, 2]]
    assert windows(torch.arange(1), 8, bos=9).tolist() == [[9, 0]]
    assert evaluate(Table(1), some_tokens(5), 16).context == 5


@pytest.mark.parametrize("count", [0, 1])
def test_a_text_with_nothing_to_predict_is_refused(count):
    with pytest.raises(TextError, match=f"{count} tokens"):
        windows(torch.arange(count), 8)


def test_no_tokens_at_all_are_refused_also_with_a_leading_token():
    with pytest.raises(TextError, match="0 tokens"):
        windows(torch.arange(0), 8, bos=1)


def test_a_context_that_cannot_hold_a_prediction_is_refused():
    with pytest.raises(TextError, match="context 1"):
        windows(torch.arange(9), 1)


def test_a_context_beyond_the_positions_of_the_model_names_the_remedy():
    with pytest.raises(TextError, match="--context 64"):
        evaluate(Table(1), some_tokens(200), 65)


def test_only_so_many_windows_are_scored():
    found = evaluate(Table(1), some_tokens(75), 10, max_windows=2)
    assert (found.windows, found.tokens) == (2, 18)


def test_two_vocabularies_are_refused_before_any_work():
    model, reference = Table(1), Table(2, vocab=VOCAB + 1)
    with pytest.raises(SourceError, match="50 tokens, 51 in the reference"):
        evaluate(model, some_tokens(40), 10, reference=reference)
    assert model.modes == []


def test_progress_counts_windows():
    seen = []
    evaluate(Table(1), some_tokens(50), 10, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_dropout_is_off_while_scoring_and_the_mode_is_restored():
    model = Table(1).train()
    evaluate(model, some_tokens(20), 10)
    assert model.modes == [False, False] and model.training


def test_autocast_around_the_call_does_not_reach_the_log_probabilities():
    plain = evaluate(Table(1), some_tokens(40), 10, reference=Table(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = evaluate(Table(1), some_tokens(40), 10, reference=Table(2))
    assert cast == plain


def test_a_model_in_half_precision_is_scored_in_float32():
    model, halved = Table(1), Table(1)
    model.table = model.table.bfloat16().float()
    halved.table = halved.table.bfloat16()
    assert evaluate(halved, some_tokens(40), 10).nll == pytest.approx(evaluate(model, some_tokens(40), 10).nll)


def test_a_hopeless_model_has_infinite_perplexity_and_no_crash():
    model = Table(1)
    model.table *= 1e4
    assert evaluate(model, some_tokens(40), 10).perplexity == math.inf
