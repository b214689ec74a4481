"""Judges of finished pictures beside the rewards; flowbp_ray/evaluators/README.md says what each does."""

from typing import Annotated

from pydantic import AfterValidator

from flowbp_ray.config import paths
from flowbp_ray.config.section import Section, Text


class GenEval(Section):
    """GenEval's six tasks, on prompts of its format (``evaluation.prompts``: its evaluation_metadata.jsonl)."""

    detector: Annotated[str, AfterValidator(lambda text: paths.model(text, {}, paths.REWARD_INDEX))] = (
        "facebook/mask2former-swin-small-coco-instance"
    )
    """Folder or Hugging Face id of a Mask2Former for COCO's instances."""
    clip: Annotated[str, AfterValidator(lambda text: paths.model(text, {}, paths.REWARD_INDEX))] = "openai/clip-vit-large-patch14"
    """Folder or Hugging Face id of the CLIP that names colours."""


class UnifiedReward(Section):
    """UnifiedReward's alignment and image quality, 1…5, from an OpenAI-compatible server."""

    url: Text
    """The server's address, which ends in ``/v1``."""
    model: Text = "CodeGoat24/UnifiedReward-7b-v1.5"
    """What the server calls the model."""
    key_variable: Text | None = None
    """The environment variable that holds the server's key; null sends no key."""
