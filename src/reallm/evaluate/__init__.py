"""Evaluate a model: perplexity on a text, KL divergence to a reference, text generation."""
