"""What open_clip itself makes of weights under its names: writes open_clip_expected.json beside this file.

    pip install --no-deps --target DIR open_clip_torch ftfy wcwidth
    PYTHONPATH=DIR python tests/rewards/make_open_clip_expected.py

open_clip is no test dependency: it needs torchvision, of which there is none for the CPU's torch. Its models don't use it: here
empty modules stand in its place while they are imported.
"""

import json
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np

FILE = Path(__file__).with_name("open_clip_expected.json")


def weights(shapes):
    """The same tensors on every machine: numpy's generator is stable, and nothing of them has to be kept."""
    draws = np.random.default_rng(0)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        scale = name.endswith("weight") and len(shape) == 1  # of a norm
        tensors[name] = (0.2 * draws.standard_normal(shape) + scale).astype(np.float32)
    return tensors


def pixels():
    """Pictures ``(3, 3, 32, 32)`` as the encoder takes them."""
    return np.random.default_rng(1).standard_normal((3, 3, 32, 32)).astype(np.float32)


IDS = [[50, 3, 7, 51] + [0] * 12, [50, *range(14), 51], [50, 51] + [0] * 14]


def main():
    import torch
    import transformers.models.clip.modeling_clip  # noqa: F401  # looks for torchvision, and is not to find it

    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.ops.misc"):
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))
    from open_clip.model import CLIP

    vision = {"image_size": 32, "patch_size": 8, "width": 160, "layers": 2, "head_width": 80, "mlp_ratio": 0.7}
    text = {"context_length": 16, "vocab_size": 52, "width": 128, "heads": 2, "layers": 2, "mlp_ratio": 0.75}
    model = CLIP(24, vision, text).eval()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if name != "attn_mask"}
    model.load_state_dict({k: torch.from_numpy(np.asarray(v)) for k, v in weights(shapes).items()}, strict=False)
    with torch.no_grad():
        images, texts = model.encode_image(torch.from_numpy(pixels())), model.encode_text(torch.tensor(IDS))
    made_by = {"open_clip_torch": version("open_clip_torch"), "torch": torch.__version__}
    FILE.write_text(json.dumps({"made_by": made_by, "shapes": shapes, "images": images.tolist(), "texts": texts.tolist()}) + "\n")


if __name__ == "__main__":
    main()
