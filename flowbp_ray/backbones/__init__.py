"""One adapter per model family over diffusers' own classes: encode, grid, velocity, decode."""
