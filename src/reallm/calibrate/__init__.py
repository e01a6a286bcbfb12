"""Calibration data and statistics: text windows, hidden states, second moments of inputs, gradients of the loss."""
