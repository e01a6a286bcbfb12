"""Text, and what it makes of a model: windows, hidden states, inputs of every matrix, gradients of the loss."""
