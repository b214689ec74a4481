"""Latents and gradients on their way between processes, as they are or in half of their bytes. Without torch."""

from typing import Literal

import numpy as np

WireDtype = Literal["float32", "bfloat16"]


def narrow(values: np.ndarray, dtype: WireDtype) -> np.ndarray:
    """Float32 values as they are sent: bfloat16 as its bits, uint16, rounded to the nearest, ties to even."""
    if dtype == "float32":
        return values
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)  # else a NaN could be rounded to infinity


def widen(values: np.ndarray) -> np.ndarray:
    """What `narrow` made, or float32, as float32."""
    return values if values.dtype != np.uint16 else (values.astype(np.uint32) << 16).view(np.float32)
