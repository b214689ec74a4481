"""Embeddings that a worker keeps."""

from collections import OrderedDict

import torch
from torch import Tensor

from flowbp_ray.backbones.backbone import Backbone, Conditioning

#: Of a worker's memory, on the host: 390 prompts of Stable Diffusion 3.5, 250 of FLUX.1, 85 of FLUX.2.
MOST_BYTES = 2**30


class Kept:
    """A backbone's embeddings of the prompts that were asked for last, at most ``most`` bytes of them: each prompt is encoded, or
    read, once as long as it is kept.
    """

    def __init__(self, backbone: Backbone, most: int = MOST_BYTES) -> None:
        self.backbone, self.most, self.bytes = backbone, most, 0
        #: By prompt, the row of each tensor; the ones asked for last at the end.
        self.rows: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def __call__(self, prompts: list[str]) -> Conditioning:
        """Those of ``prompts``, in their order, on the backbone's device; errors as `Backbone.encode` has them."""
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.rows]:
            # A batch of another size is rounded otherwise, and what becomes of a prompt must not depend on what is kept.
            filling = new[-1:] * (len(prompts) - len(new)) if self.backbone.embeds is None else []
            # What is read is on the host, where it stays.
            found = (self.backbone.embeds or self.backbone.encode_texts)(new + filling).tensors
            for number, prompt in enumerate(new):
                self.rows[prompt] = {name: tensor[number].to("cpu", copy=True) for name, tensor in found.items()}
                self.bytes += _bytes(self.rows[prompt])
        rows = [self.rows[prompt] for prompt in prompts]
        for prompt in prompts:
            self.rows.move_to_end(prompt)
        while self.bytes > self.most:
            self.bytes -= _bytes(self.rows.popitem(last=False)[1])
        return Conditioning({name: torch.stack([row[name] for row in rows]) for name in rows[0]}).to(self.backbone.device)


def _bytes(row: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in row.values())
