"""Differentiable rewards over transformers' own classes: pictures in 0…1 and prompts to one score a picture."""

from pathlib import Path

from torch import nn

from flowbp_ray.config.reward import FILES, RewardComponent


def load(component: RewardComponent) -> nn.Module:
    """The reward of a component: frozen, ``forward(images (B, 3, H, W) in 0…1, prompts) → (B,)`` float32.

    Each kind's libraries are imported when it is asked for. ValueError for files that are not that kind's.
    """
    match component.kind:
        case "clip" | "clip_score":
            from flowbp_ray.rewards.clip import CLIPScore

            return CLIPScore(component.source, component.encoder_source, scaled=component.kind == "clip")
        case "hpsv2":
            from flowbp_ray.rewards.hpsv2 import HPSv2

            return HPSv2(_checkpoint(component), component.encoder_source)
        case "image_reward":
            from flowbp_ray.rewards.image_reward import ImageReward

            return ImageReward(_checkpoint(component), component.encoder_source)
        case "aesthetic":
            from flowbp_ray.rewards.aesthetic import Aesthetic

            return Aesthetic(_checkpoint(component), component.encoder_source)
        case "function":
            from flowbp_ray.rewards.user import UserReward

            return UserReward(component.source)


def _checkpoint(component: RewardComponent) -> Path:
    """The file on this machine, downloaded if its source is a Hugging Face id."""
    from huggingface_hub import hf_hub_download

    path = Path(component.source)
    return path if path.is_absolute() else Path(hf_hub_download(component.source, FILES[component.kind].weights))
