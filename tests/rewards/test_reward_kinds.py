"""What holds for every kind of reward, loaded as the reward service loads it."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_rewards
import torch
import yaml
from tiny_rewards import PROMPTS

from flowbp_ray import config, rewards
from flowbp_ray.rewards.aesthetic import Aesthetic
from flowbp_ray.rewards.clip import CLIPScore
from flowbp_ray.rewards.hpsv2 import HPSv2
from flowbp_ray.rewards.image_reward import ImageReward
from flowbp_ray.rewards.user import UserReward
from serve.rewards import here

CONFIG = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"
CLASSES = {
    "clip": CLIPScore,
    "clip_score": CLIPScore,
    "hpsv2": HPSv2,
    "image_reward": ImageReward,
    "aesthetic": Aesthetic,
    "function": UserReward,
}


def brightness(images, prompts):
    return images.square().mean((1, 2, 3))


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """The configuration's section with one component of each kind."""
    components = [{"name": "function", "kind": "function", "path": f"{__name__}:brightness", "weight": 1}]
    for kind in ("clip", "hpsv2", "image_reward", "aesthetic"):
        folder = getattr(tiny_rewards, f"saved_{kind}")(tmp_path_factory.mktemp(kind))
        encoder = None if kind == "clip" else str(folder)
        components.append({"name": kind, "kind": kind, "path": str(folder), "encoder": encoder, "weight": 1})
    components.append(components[1] | {"name": "clip_score", "kind": "clip_score"})
    return config.load(CONFIG, [f"reward={yaml.dump({'components': components}, default_flow_style=True)}"]).reward


@pytest.mark.parametrize("kind", CLASSES)
def test_the_gradient_is_the_difference_between_two_pictures(reward, kind, monkeypatch):
    score = rewards.load(next(c for c in reward.components if c.kind == kind)).double()
    torch.manual_seed(0)
    images = torch.rand(2, 3, 40, 56, dtype=torch.float64, requires_grad=True)
    scores = score(images, PROMPTS)
    assert (scores.shape, scores.dtype) == ((2,), torch.float32)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.flatten(1).abs().max(1).values.min() > 0
    assert not any(p.requires_grad for p in score.parameters())
    assert not any(part.training for part in score.modules() if part is not score)
    monkeypatch.setattr(torch.Tensor, "float", lambda scores: scores)  # float32 has no digits left for small differences
    step = 1e-7 * gradient.sign()
    with torch.no_grad():
        difference = (score(images + step, PROMPTS) - score(images - step, PROMPTS)).sum().item() / 2
    assert difference == pytest.approx((gradient * step).sum().item(), rel=1e-5)


def test_a_sample_is_scored_as_it_is_alone(reward):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 40, 56)
    for component in reward.components:
        score = rewards.load(component)
        alone = torch.cat([score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
        torch.testing.assert_close(score(images, PROMPTS), alone)


def test_clip_score_is_the_cosine_and_clip_has_the_logit_scale(reward):
    images = torch.rand(2, 3, 32, 32)
    clip, clip_score = (rewards.load(next(c for c in reward.components if c.kind == kind)) for kind in ("clip", "clip_score"))
    cosine = clip_score(images, PROMPTS)
    assert cosine.abs().max() <= 1
    torch.testing.assert_close(clip(images, PROMPTS), cosine * clip.model.logit_scale.exp())


def test_the_service_has_the_class_of_each_kind(reward):
    whole = config.load(CONFIG, []).model_copy(update={"reward": reward})
    found = {c.name: type(c.score) for c in here(whole).components}
    assert found == CLASSES


def test_every_text_reward_wants_a_prompt_for_every_picture(reward):
    for component in reward.components:
        if component.kind not in ("function", "aesthetic"):
            with pytest.raises(ValueError, match="2 pictures but 1 prompts"):
                rewards.load(component)(torch.rand(2, 3, 32, 32), ["a ring"])


def test_rewards_need_no_ray_and_no_mlflow():
    names = ", ".join(
        f"flowbp_ray.rewards.{kind}" for kind in ("clip", "hpsv2", "image_reward", "aesthetic", "user", "objective")
    )
    code = f"import sys, {names}; sys.exit(bool({{'ray', 'mlflow', 'torchvision'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
