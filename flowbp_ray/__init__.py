"""Reward backpropagation for text-to-image flow models on Ray: surrogate gradients from cached rollouts."""
