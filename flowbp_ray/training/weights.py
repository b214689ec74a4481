"""The weights that are trained, an adapter's or a whole transformer's: whole in every process, or a shard in each (FSDP2).

Both have the same names and the same operations: add up gradients, average, swap, publish in chunks, gather. A sharded
parameter is a DTensor; what is its own of it, `local`, is a run of rows, and so a run of its memory.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from flowbp_ray.backbones.backbone import Backbone
from flowbp_ray.rollouts.batches import Chunk, Piece

State = dict[str, Tensor]
#: Replaces a tensor in place by its sum over all train workers.
AddUp = Callable[[Tensor], None]

CHUNK = 64 * 2**20  # bytes: what a push holds in memory beside the weights themselves


def shard(backbone: Backbone, device: str, compute: torch.dtype) -> None:
    """Shard the transformer over all train workers' ``device``s, block by block (FSDP2), so that none has all of it at any
    time if it is on the CPU before; all else of the pipeline goes there too. It computes in ``compute``, sums are float32.

    Trainable parameters become float32, whatever they were: the master weights. Inputs are cast by the models themselves:
    FSDP's own cast would round timesteps.
    """
    transformer, backbone.compute = backbone.transformer, compute
    mesh = dist.device_mesh.init_device_mesh(device, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in [*backbone.blocks(transformer), transformer]:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if any(p.requires_grad and p.dtype != torch.float32 for p in transformer.parameters()):
        transformer.to(torch.float32)
    backbone.pipeline.to(device)


def local(parameter: Tensor) -> Tensor:
    """What this process has of a parameter, without gradient: a view."""
    own = parameter.detach()
    return own.to_local() if isinstance(own, DTensor) else own


def first(parameter: Tensor) -> int:
    """Which of the parameter's values, counted as they lie in memory, is the first of `local`'s."""
    if not isinstance(parameter, DTensor):
        return 0
    rows = parameter.shape[0]
    share = math.ceil(rows / parameter.device_mesh.size())
    return min(share * parameter.device_mesh.get_local_rank(), rows) * math.prod(parameter.shape[1:])


def whole(tensor: Tensor) -> Tensor:
    """A parameter on the CPU. Of a sharded one, every worker has to ask at the same time."""
    own = tensor.detach()
    return (own.full_tensor() if isinstance(own, DTensor) else own).cpu()


class Weights:
    """All parameters of a transformer that require gradients, by name; gradients are summed in float64 and added up once an
    update, so that they do not depend on how micro-batches are shared out."""

    def __init__(self, transformer: nn.Module) -> None:
        self.parameters = {name: p for name, p in sorted(transformer.named_parameters()) if p.requires_grad}
        self.gradient = self._sums()

    def _sums(self) -> Tensor:
        device = next(iter(self.parameters.values())).device
        return torch.zeros(sum(p.numel() for p in self.parameters.values()), dtype=torch.float64, device=device)

    def read(self) -> State:
        """A copy of this process's part."""
        return {name: local(p).clone() for name, p in self.parameters.items()}

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Replace this process's part by what `read` gave."""
        for name, parameter in self.parameters.items():
            local(parameter).copy_(state[name])

    @contextmanager
    def replaced(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        """Have another state in the model for a while."""
        own = self.read()
        self.write(state)
        try:
            yield
        finally:
            self.write(own)

    def average(self, averaged: State, decay: float) -> None:
        """One step of the exponential moving average, in place: ``decay·averaged + (1 − decay)·weights``."""
        for name, parameter in self.parameters.items():
            averaged[name].copy_(torch.lerp(local(parameter), averaged[name], decay))

    def collect(self) -> None:
        """Take up the gradient of a micro-batch; RuntimeError where a parameter has none."""
        gradients = self._gradients()
        self.gradient += torch.cat([g.flatten() for g in gradients])
        for parameter in self.parameters.values():
            parameter.grad = None

    def finish(self, limit: float, add_up: AddUp | None) -> float:
        """Put the step's gradient, scaled down to the norm ``limit``, where the optimizer takes it.

        Returns the norm before; if that is not finite, the caller has to skip the step.
        """
        if add_up is not None:
            add_up(self.gradient)
        flat = self.gradient.float()
        self.gradient.zero_()
        norm = clip_by_norm([flat], limit)
        parameters = self.parameters.values()
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
        return norm

    def _gradients(self) -> list[Tensor]:
        gradients = [p.grad for p in self.parameters.values()]
        if missing := [name for name, g in zip(self.parameters, gradients, strict=True) if g is None]:
            raise RuntimeError(f"{len(missing)} of {len(gradients)} trained parameters received no gradient: {missing[0]} …")
        return [g for g in gradients if g is not None]

    def chunks(self, dtype: torch.dtype) -> Iterator[Chunk]:
        """This process's part as `load_chunk` takes it into a model of ``dtype``; all parts together are a policy version."""
        pieces: list[Piece] = []
        room = CHUNK
        for name, parameter in self.parameters.items():
            flat, start = local(parameter).flatten(), first(parameter)
            done = 0
            while done < len(flat):
                run = flat[done : done + max(1, room // dtype.itemsize)].to("cpu", dtype, copy=True)
                pieces.append(Piece(name, start + done, run.view(torch.uint8).numpy()))
                done, room = done + len(run), room - len(run) * dtype.itemsize
                if room < dtype.itemsize:
                    yield Chunk(tuple(pieces), checksum(pieces))
                    pieces, room = [], CHUNK
        if pieces:
            yield Chunk(tuple(pieces), checksum(pieces))


class ShardedWeights(Weights):
    """Of a transformer that `shard` was given. FSDP adds up the gradients itself, after every active step or, if they are to
    stay whole until then, after the last one of an update."""

    def _sums(self) -> Tensor:
        return torch.zeros(0)

    def collect(self) -> None:
        """FSDP has them."""

    def finish(self, limit: float, add_up: AddUp | None) -> float:
        """As `Weights.finish`; what FSDP has are means over the workers."""
        return clip_by_norm([local(g) for g in self._gradients()], limit, add_up)


def clip_by_norm(gradients: list[Tensor], limit: float, add_up: AddUp | None = None) -> float:
    """Scale the gradients in place so that their joint norm is at most ``limit``; returns the norm before.

    With ``add_up`` they are one worker's part.
    """
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    if add_up is not None:
        squares = norm**2
        add_up(squares)
        norm = squares.sqrt()
    found = norm.item()
    if math.isfinite(found) and found > limit:
        for gradient in gradients:
            gradient.mul_(limit / found)
    return found


def checksum(pieces: Sequence[Piece]) -> str:
    """SHA-256 over names, places and bytes: equal on both sides of a push, or the push failed."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(f"{piece.parameter}{piece.start}".encode())
        digest.update(piece.values.data)
    return digest.hexdigest()


def load_chunk(parameters: Mapping[str, Tensor], chunk: Chunk) -> int:
    """Put a chunk in its place, in memory; returns the number of values.

    RuntimeError if what is there then is not what was published, or there is no such place.
    """
    held = []
    for piece in chunk.pieces:
        if piece.parameter not in parameters:
            raise RuntimeError(f"this model has no {piece.parameter}, of which a policy has values: it is another model's")
        parameter = parameters[piece.parameter].detach().view(-1)
        place = parameter[piece.start : piece.start + len(piece.values) // parameter.dtype.itemsize]
        given = torch.from_numpy(np.array(piece.values)).view(parameter.dtype)
        if given.shape != place.shape:
            raise RuntimeError(f"a policy has more values of {piece.parameter} than this model: it is another model's")
        place.copy_(given)
        held.append(Piece(piece.parameter, piece.start, place.cpu().view(torch.uint8).numpy()))
    if (found := checksum(held)) != chunk.checksum:
        raise RuntimeError(f"the model holds {found[:12]}, not {chunk.checksum[:12]}, after loading a part of a policy")
    return sum(len(p.values) // parameters[p.parameter].dtype.itemsize for p in chunk.pieces)
