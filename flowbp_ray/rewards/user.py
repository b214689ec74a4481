"""A reward of one's own, named by its import path."""

from collections.abc import Callable
from importlib import import_module

from torch import Tensor, nn


def imported(path: str) -> Callable[[Tensor, list[str]], Tensor]:
    """What is called for scores: the function ``package.module:name``, or an instance of the class made without arguments.

    ValueError, with the reason, where there is none.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name)
        made = found() if isinstance(found, type) else found
    except Exception as error:  # it is the user's code, which may raise anything
        raise ValueError(f"the reward {path} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(made):
        raise ValueError(f"the reward {path} cannot be called: name a function of pictures and prompts, or a class of such")
    return made


class UserReward(nn.Module):
    """The interface of all rewards around what was imported; a module is frozen and goes to the device with it."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.score = path, imported(path)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """One score a picture: ``(B,)`` from pictures ``(B, 3, H, W)`` in 0…1 and ``B`` prompts."""
        scores = self.score(images.clone(), prompts)  # which it may change in place: other rewards and judges see the same ones
        if not isinstance(scores, Tensor):
            raise ValueError(f"the reward {self.path} gave a {type(scores).__name__}: return a tensor with one score a picture")
        return scores.float()
