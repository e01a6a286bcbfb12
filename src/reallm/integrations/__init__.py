"""Compressed models in other packages: PEFT and lm-eval."""
