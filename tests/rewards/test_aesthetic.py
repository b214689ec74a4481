import pytest
import torch
from tiny_rewards import LONG, saved_aesthetic
from torch.nn import functional as F
from transformers import CLIPModel

from flowbp_ray.config.reward import FILES
from flowbp_ray.rewards.aesthetic import Aesthetic
from flowbp_ray.rewards.checkpoints import read
from flowbp_ray.rewards.clip import pixel_values


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_aesthetic(tmp_path_factory.mktemp("aesthetic"))


@pytest.fixture
def reward(folder):
    return Aesthetic(folder / FILES["aesthetic"].weights, folder)


def test_score_and_gradient_are_those_of_the_published_formula(folder, reward):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 40, 56, dtype=torch.float64, requires_grad=True)
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float64)
    weights = read(folder / FILES["aesthetic"].weights)
    x = F.normalize(clip.get_image_features(pixel_values=pixel_values(images, 32)).pooler_output, dim=-1)
    for number in (0, 2, 4, 6, 7):
        x = F.linear(x, *(weights[f"layers.{number}.{kind}"].double() for kind in ("weight", "bias")))
    here, there = reward.double()(images, ["", ""]), x[:, 0]
    assert here.dtype == torch.float32
    torch.testing.assert_close(here.double(), there, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(scores.sum(), images)[0] for scores in (here, there))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    assert theirs.abs().max() > 1e-5


def test_prompts_play_no_part(reward, recwarn):
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(reward(images, ["a ring", LONG]), reward(images, ["", ""]))
    assert not recwarn


def test_a_folder_without_all_of_the_clip_is_refused(folder, tmp_path):
    clip = CLIPModel.from_pretrained(folder)
    state = {k: v for k, v in clip.state_dict().items() if k != "visual_projection.weight"}
    clip.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=f"{tmp_path} is no CLIPModel: it has no visual_projection.weight"):
        Aesthetic(folder / FILES["aesthetic"].weights, tmp_path)


def test_another_file_is_refused_in_one_sentence(folder, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"layers.0.weight": torch.ones(2, 2)}, path)
    with pytest.raises(ValueError, match=r"other\.pth is another reward's checkpoint, or none: it has no layers\.2\.weight"):
        Aesthetic(path, folder)
