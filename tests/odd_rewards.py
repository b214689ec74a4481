"""Rewards of one's own that a replica can import: plain ones, and ones that break as their prompts say."""

import os
import time
from pathlib import Path

import torch


def brightness(images, prompts):
    return 3 * images.mean((1, 2, 3))


def of_a_job(images, prompts):
    assert os.environ["OF_A_JOB"] == "yes"
    return brightness(images, prompts)


def slow(images, prompts):
    time.sleep(3)
    return brightness(images, prompts)


def sharpness(images, prompts):
    return 10 * images.diff(dim=-1).square().mean((1, 2, 3)) + torch.tensor([float(len(p)) for p in prompts])


class Breaking:
    """Brightness, but for the prompt ``HOW FILE`` the replica that makes the file first breaks in this way, and stays broken."""

    def __init__(self):
        self.broken = set()

    def __call__(self, images, prompts):
        how, _, marker = prompts[0].partition(" ")
        if marker.startswith("/"):
            try:
                Path(marker).touch(exist_ok=False)
                self.broken.add(marker)
            except FileExistsError:
                pass
        if marker in self.broken or how == "always":
            if how == "exit":
                os._exit(1)
            if how == "hang":
                time.sleep(10)
            if how == "raise":
                raise OSError("the device is lost")
            return brightness(images, prompts) * float("nan")
        return brightness(images, prompts)
