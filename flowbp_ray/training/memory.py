"""What an alignment takes of a GPU's memory, counted without one: on the meta device a full-size model costs nothing.

Counted are bytes of tensors. A CUDA context, kernels' workspaces and what the allocator loses between blocks are not.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowbp_ray.backbones.backbone import Backbone


class Live(TorchDispatchMode):
    """Bytes of the tensors that are made inside and still alive, now and at their peak; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, tuple[int, weakref.ref[Any]]] = {}  # bytes, by the address of the storage

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation; what it is given, unless it was made inside, was there before."""
        for given in tree_leaves((args, kwargs)):
            self._see(given, made=False)
        result = function(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            self._see(made, made=True)
        return result

    def _see(self, value: object, made: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            size = storage.nbytes() if made else 0
            self._seen[key] = size, weakref.ref(storage, lambda _: self._forget(key))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._seen.pop(key)[0]


@contextmanager
def fused_attention() -> Iterator[None]:
    """Have attention on the meta device as GPUs do it; by itself it is the plain one, which keeps tokens × tokens weights."""
    plain = F.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *more: Any, **named: Any) -> Tensor:
        if query.device.type != "meta" or attn_mask is not None:
            return plain(query, key, value, attn_mask, *more, **named)
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    F.scaled_dot_product_attention = fused  # a TorchFunctionMode would not see what checkpointing computes again
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def peak(run: Callable[[], object]) -> int:
    """Bytes at the peak of ``run``, beside what was there before."""
    with fused_attention(), Live() as live:
        run()
    return live.peak


@dataclass(frozen=True)
class Needs:
    """Bytes on one GPU that a train worker, a sampler and the rewards share, each with its own share at the same time."""

    #: Whatever the micro-batch: weights, gradients, optimizer, averages, of all three.
    held: int
    #: Of the optimizer's step and the average, when the update's are gone.
    step: int
    #: The update's, for each sample of the micro-batch.
    update: int
    #: The sampler's and the rewards', for each sample of the micro-batch.
    others: int

    def micro_batch(self, cap: int) -> int:
        """The largest micro-batch that fits under ``cap`` bytes; 0 if none does."""
        room = cap - self.held
        return max(0, min(room // (self.update + self.others), (room - self.step) // self.others))


def held(backbone: Backbone) -> tuple[int, int]:
    """What a `Learner` keeps on its GPU whatever the micro-batch, and what its optimizer's step takes beside.

    All weights are trained in a shard (FSDP2), on one GPU of everything: weights, gradients, AdamW's two moments and the
    average in float32, and, in the computing dtype, two gathered blocks and the gradients of one, which are summed in float32.
    An adapter's are in float32, its gradients also summed in float64.
    The step makes one copy of what is trained, AdamW's denominators.
    """
    transformer = backbone.transformer
    trained = [p for p in transformer.parameters() if p.requires_grad]
    numel, own, everything = sum(p.numel() for p in trained), size(trained), weights(transformer)
    if len(trained) < len(list(transformer.parameters())):
        return everything + 4 * own + 8 * numel, max(own, 4 * numel)
    block = max(sum(p.numel() for p in b.parameters()) for b in backbone.blocks(transformer))
    buffers = sum(b.numel() for b in transformer.buffers())
    return 20 * numel + 4 * buffers + (3 * backbone.dtype.itemsize + 4) * block, 4 * numel


def weights(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return size([*module.parameters(), *module.buffers()])


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)
