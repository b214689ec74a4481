"""The embedded default: a small world of drawn shapes, its exact checker, and the models trained on it."""

from pathlib import Path

#: The committed models, in the libraries' own on-disk formats: a Stable Diffusion 3 pipeline and two CLIPs.
MODELS = Path(__file__).parent / "models"
BASE, REWARD, JUDGE = MODELS / "base", MODELS / "reward", MODELS / "judge"
