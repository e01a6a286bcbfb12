"""Other packages that run a compressed model, or that it runs in: PEFT, lm-eval."""
