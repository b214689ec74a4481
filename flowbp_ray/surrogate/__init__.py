"""Surrogate gradients for reward backpropagation: plans, the methods that draw them, and the backward that walks them."""
