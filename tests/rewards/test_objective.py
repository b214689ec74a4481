import pytest
import torch

from flowbp_ray.errors import DeadRewardError
from flowbp_ray.rewards.objective import Component, objective

PROMPTS = ["one", "two", "three"]


def decode(latents):
    return torch.sigmoid(torch.nn.functional.interpolate(latents[:, :3], scale_factor=2))


def brightness(images, prompts):
    return images.mean((1, 2, 3)) * 3


def contrast(images, prompts):
    return images.flatten(1).std(1) + torch.tensor([len(p) for p in prompts])


LATENTS = torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_it_is_the_weighted_sum_of_clipped_components_and_its_gradient():
    parts = [Component("b", brightness, 2.0, clip=1.5), Component("c", contrast, -0.5), Component("watched", contrast, 0.0)]
    scored = objective(LATENTS, PROMPTS, decode, parts)
    x = LATENTS.clone().requires_grad_()
    b, c = brightness(decode(x), PROMPTS), contrast(decode(x), PROMPTS)
    assert (b > 1.5).any()
    assert (b < 1.5).any()
    whole = 2 * torch.minimum(b, torch.tensor(1.5)) - 0.5 * c
    torch.testing.assert_close(scored.objective, whole.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(scored.gradient, torch.autograd.grad(whole.sum(), x)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(scored.components["watched"], c.detach())
    torch.testing.assert_close(scored.components["b"], b.detach())  # reported without the clip


def test_a_monitored_component_is_scored_without_a_graph():
    seen = []

    def watched(images, prompts):
        seen.append((images.requires_grad, torch.is_grad_enabled()))
        return brightness(images, prompts)

    objective(LATENTS, PROMPTS, decode, [Component("b", brightness, 1.0), Component("w", watched, 0.0)])
    assert seen == [(False, False)]


def test_a_reward_that_is_not_finite_is_an_error_that_names_it_and_the_prompts():
    def dead(images, prompts):
        return brightness(images, prompts) / torch.tensor([1.0, 0.0, 1.0])

    with pytest.raises(DeadRewardError, match=r"'dead' is not finite for the prompts \['two'\]"):
        objective(LATENTS, PROMPTS, decode, [Component("dead", dead, 1.0)])


def test_a_gradient_that_is_not_finite_is_an_error():
    def root(images, prompts):
        return (images - images).abs().sqrt().sum((1, 2, 3))

    with pytest.raises(DeadRewardError, match=r"the gradient of the reward 'root' is not finite"):
        objective(LATENTS, PROMPTS, decode, [Component("root", root, 1.0)])


def test_one_value_for_each_picture():
    with pytest.raises(ValueError, match=r"'mean' gave .* for 3 pictures, not one value each"):
        objective(LATENTS, PROMPTS, decode, [Component("mean", lambda i, p: i.mean(), 1.0)])


def test_a_reward_without_a_gradient_can_only_be_watched():
    def judged(images, prompts):
        return brightness(images, prompts).detach()

    with pytest.raises(ValueError, match="the reward 'judged' has no gradient at the pictures: only with weight 0"):
        objective(LATENTS, PROMPTS, decode, [Component("b", brightness, 1.0), Component("judged", judged, 1.0)])
    scored = objective(LATENTS, PROMPTS, decode, [Component("b", brightness, 1.0), Component("judged", judged, 0.0)])
    torch.testing.assert_close(scored.components["judged"], scored.components["b"])
