"""How good a model is: perplexity of a text, distance to a reference, and what it writes."""
