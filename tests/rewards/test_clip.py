import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from flowbp_ray.rewards import checkpoints
from flowbp_ray.rewards.clip import CLIPScore, pixel_values
from flowbp_ray.shapes.build.preference_model import Size, new_clip
from flowbp_ray.shapes.build.text import clip_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip")
    tokenizer = clip_tokenizer()
    new_clip(Size(16, 1, 2, steps=1), tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def processed(picture, size):
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return processor(Image.fromarray(picture), return_tensors="pt").pixel_values[0]


def test_a_picture_of_the_right_size_is_preprocessed_exactly_as_clip_does():
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    ours = pixel_values(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255, 64)[0]
    torch.testing.assert_close(ours, processed(picture, 64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(96, 128), (150, 80), (65, 64)])
def test_another_size_is_resized_and_cropped_as_clip_does_to_five_levels(shape):
    rng = np.random.default_rng(1)
    picture = np.asarray(
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize(shape[::-1], Image.Resampling.BICUBIC)
    )
    ours = pixel_values(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255, 64)[0]
    assert ours.shape == (3, 64, 64)
    assert (ours - processed(picture, 64)).abs().max() <= 5 / 255 / 0.26  # PIL rounds and clips


class Spy:
    """What a pickle can do."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_nothing_in_a_folder_or_a_checkpoint_is_run(folder, tmp_path):
    mark, pickled = tmp_path / "was here", tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    (pickled / "model.safetensors").unlink()
    for file in (pickled / "pytorch_model.bin", tmp_path / "checkpoint.pt"):
        torch.save({"logit_scale": Spy(mark)}, file)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        CLIPScore(pickled)
    with pytest.raises(ValueError, match="is no file of weights"):
        checkpoints.read(tmp_path / "checkpoint.pt")
    assert not mark.exists()
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)
    assert mark.exists()  # so it would have been


def test_scores_are_logit_scale_times_cosine(folder):
    reward = CLIPScore(folder)
    images, prompts = torch.rand(3, 3, 64, 64), ["a ring", "two crosses", "a red ring above a cross"]
    tokens = reward.tokens.tokenizer(prompts, padding="max_length", return_tensors="pt")
    output = reward.model(input_ids=tokens.input_ids, pixel_values=pixel_values(images, 64))
    torch.testing.assert_close(reward(images, prompts), output.logits_per_image.diagonal())


def test_scores_carry_gradients_to_the_pictures_alone(folder):
    reward = CLIPScore(folder).double()
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(reward(images, ["a ring"]).sum(), images)
    assert all(p.grad is None for p in reward.parameters())
    direction = torch.randn_like(images)
    with torch.no_grad():
        step = 1e-3
        difference = reward.double()(images + step * direction, ["a ring"]) - reward(images - step * direction, ["a ring"])
    assert (gradient * direction).sum().item() == pytest.approx(difference.item() / (2 * step), rel=1e-2)


def test_a_prompt_for_every_picture(folder):
    with pytest.raises(ValueError, match="2 pictures but 1 prompts"):
        CLIPScore(folder)(torch.rand(2, 3, 64, 64), ["a ring"])


def test_a_long_prompt_is_cut_and_that_is_said_once(folder, recwarn):
    reward = CLIPScore(folder)
    images, long = torch.rand(1, 3, 64, 64), " ".join(["ring"] * 20)
    scores = reward(images, [long])
    reward(images, [long])
    assert [str(w.message) for w in recwarn] == [f"{folder} reads 16 tokens and {long!r} has 22: its end is not scored"]
    torch.testing.assert_close(reward(images, [" ".join(["ring"] * 14)]), scores)


def test_a_tokenizer_may_lie_elsewhere(folder, tmp_path):
    clip_tokenizer().save_pretrained(tmp_path)
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(CLIPScore(folder, tmp_path)(images, ["a ring"]), CLIPScore(folder)(images, ["a ring"]))
