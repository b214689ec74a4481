"""Sampling on Ray: rollouts for training, evaluation, prompts encoded ahead, and requests to the reward service."""
