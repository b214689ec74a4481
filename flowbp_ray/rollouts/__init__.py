"""Cached rollouts: sampling without gradient, keeping what a plan needs and nothing else."""
