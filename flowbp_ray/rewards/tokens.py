"""Prompts as token ids, for every reward that reads them."""

import warnings

from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase


class Tokens:
    """A reward's tokenizer: ids of one length. The end of a longer prompt is not read, as in the original; it is said once."""

    def __init__(self, reward: str, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.reward, self.tokenizer, self.length, self.said = reward, tokenizer, length, False

    def __call__(self, prompts: list[str], images: Tensor) -> BatchEncoding:
        """``input_ids`` and ``attention_mask (B, length)``, beside the pictures ``(B, 3, H, W)``.

        ValueError where there isn't a prompt for every picture.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures but {len(prompts)} prompts: give one prompt for each picture")
        for prompt in () if self.said else prompts:
            number = len(self.tokenizer(prompt, verbose=False).input_ids)
            if number > self.length:
                self.said = True
                text = f"{self.reward} reads {self.length} tokens and {prompt!r} has {number}: its end is not scored"
                warnings.warn(text, stacklevel=2)
                break
        return self.tokenizer(prompts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt").to(
            images.device
        )
