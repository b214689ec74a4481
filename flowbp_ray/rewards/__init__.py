"""Differentiable rewards over transformers' own classes: pictures in 0…1 and prompts to one score a picture."""
