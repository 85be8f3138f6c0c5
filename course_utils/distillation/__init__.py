"""Distillation: a student learns from its teacher's probabilities, features or written steps."""
