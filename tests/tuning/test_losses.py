"""Top-k KL: all tokens outside the teacher's top k count as one."""

import torch

from reallm.tuning.losses import Teacher, loss_sums, top_k_log_probs

VOCABULARY = 40


def logits(seed):
    return 2 * torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def lumped(logits, token_ids):
    """Return probabilities (tokens, k + 1) in float64: of `token_ids`, and the residual mass."""
    probabilities = logits.double().softmax(-1)
    kept = probabilities.gather(-1, token_ids.long())
    return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)


def divergence(theirs, ours):
    return (theirs * (theirs.log() - ours.log())).sum(-1)


def test_tokens_that_are_not_kept_count_as_one():
    theirs, ours = logits(0), logits(1)
    token_ids, log_probs = top_k_log_probs(theirs, 5)
    found = Teacher(token_ids=token_ids, log_probs=log_probs).divergence(ours.log_softmax(-1), slice(None))
    p, q = lumped(theirs, token_ids), lumped(ours, token_ids)
    rest = p[:, -1] * (p[:, -1] / q[:, -1]).log()
    assert (rest.abs() > 0.05).all()  # else the residual mass would not matter
    torch.testing.assert_close(found.double(), divergence(p, q), rtol=1e-2, atol=2e-3)  # stored in float16


def test_a_model_that_says_the_same_has_no_divergence_whatever_is_kept():
    token_ids, log_probs = top_k_log_probs(logits(0), 5)
    found = Teacher(token_ids=token_ids, log_probs=log_probs).divergence(logits(0).log_softmax(-1), slice(None))
    torch.testing.assert_close(found, torch.zeros(6), rtol=0, atol=2e-3)


def test_all_tokens_kept_are_the_whole_distribution():
    theirs, ours, targets = logits(0), logits(1), torch.arange(6)
    token_ids, log_probs = top_k_log_probs(theirs, VOCABULARY)
    kept = Teacher(token_ids=token_ids, log_probs=log_probs.float())
    whole = Teacher(head=lambda states: states, states=theirs)
    sums = [loss_sums(lambda s: s, ours, targets, teacher, "kl", VOCABULARY)[0] for teacher in (kept, whole)]
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-3, atol=1e-3)
    exact = divergence(*(values.double().softmax(-1) for values in (theirs, ours))).sum()
    torch.testing.assert_close(sums[1], exact.float(), rtol=1e-5, atol=1e-5)
