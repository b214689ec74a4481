"""The gradient study against plain autograd through the sampler."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flowbp_ray.config import load
from flowbp_ray.config.surrogates import SECTIONS
from flowbp_ray.randomness import generator_of
from flowbp_ray.rollouts.prompts import read_prompts
from flowbp_ray.rollouts.sampler import Sampler
from flowbp_ray.training.study import EXACT, Study, Trajectory, methods_of
from flowbp_ray.training.weights import Weights

CONFIG = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"
SETTINGS = ("train.micro_batch=4", "surrogate.active_steps=2", "adapter.rank=2", "train.batch=8")
STEPS, SAMPLES = 3, 2


def towards_zero(latents, prompts):
    """The gradient of the objective −½ Σ x²."""
    assert len(latents) == len(prompts)
    return -latents


def section(method, **settings):
    return SECTIONS[method].model_validate({"method": method, **settings})


@pytest.fixture(scope="module")
def studied(tiny_pipeline):
    study = Study(load(CONFIG, [*SETTINGS, f"sampling.steps={STEPS}", f"model.path={tiny_pipeline}"]), SAMPLES, towards_zero)
    generator = torch.Generator().manual_seed(1)
    for parameter in study.parameters:  # away from the start, where half of the gradient is 0
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return study


@pytest.fixture(scope="module")
def trajectory(studied):
    return studied.trajectory(STEPS)


def through_the_sampler(study, trajectory):
    """Objectives of the samples and their initial noise, with the whole graph between them."""
    start = trajectory.latents[0].clone().requires_grad_()
    x, sigmas = start, trajectory.sigmas
    for i in range(STEPS):
        v = study.backbone.velocity(x, sigmas[i], study.text, study.negative, study.config.sampling.guidance_scale)
        x = x + (sigmas[i + 1] - sigmas[i]) * v
    return -0.5 * x.square().flatten(1).sum(1), start, x


def test_the_exact_gradient_is_that_of_autograd_through_the_sampler(studied, trajectory):
    objectives, _, last = through_the_sampler(studied, trajectory)
    torch.testing.assert_close(last.detach(), trajectory.latents[STEPS], rtol=1e-4, atol=1e-4)
    ours = studied.gradients(trajectory, EXACT, EXACT.plan(trajectory.sigmas, None), 0)
    for row, objective in zip(ours, objectives, strict=True):
        gradients = torch.autograd.grad(-objective, studied.parameters, retain_graph=True)
        wanted = torch.cat([g.flatten() for g in gradients]).double()
        assert wanted.norm() > 0
        assert (row - wanted).norm() <= 1e-5 * wanted.norm()


def test_the_chain_is_that_of_autograd_through_the_sampler(studied, trajectory):
    objectives, start, last = through_the_sampler(studied, trajectory)
    first, final = torch.autograd.grad(objectives.sum(), (start, last))
    wanted = first.flatten(1).norm(dim=1) / final.flatten(1).norm(dim=1)
    torch.testing.assert_close(studied.chain(trajectory), wanted, rtol=1e-4, atol=0)
    assert not torch.allclose(wanted, torch.ones(SAMPLES), atol=1e-2)


def test_truncation_at_all_steps_is_exact_and_detaching_the_negative_branch_is_not(studied, trajectory):
    methods = {
        "attached": section("truncated", active_steps=STEPS, detach_negative=False),
        "detached": section("truncated", active_steps=STEPS),
    }
    told = []
    compared = studied.compared(trajectory, methods, 2, told.append)
    attached, detached = compared["attached"], compared["detached"]
    for value in (attached.angle, attached.angle_error, attached.sample_angle, attached.variance):
        assert value == pytest.approx(0, abs=1e-5)
    assert (attached.norm, attached.sample_norm) == pytest.approx((1, 1))
    assert detached.angle > 1
    assert sum(told) == 4


def test_only_what_is_drawn_varies(studied, trajectory):
    sparse, draft_lv = section("sparse", active_steps=1, late_bias=0), section("draft_lv")
    sections = (sparse, draft_lv, section("truncated", active_steps=1))
    drawn = {s.method: studied.drawn(trajectory, s, 4, lambda _: None) for s in sections}
    assert drawn["truncated"].moments.variance.tolist() == [0] * (SAMPLES + 1)
    assert drawn["truncated"].times == [4]
    assert drawn["sparse"].moments.variance.min() > 0
    assert 1 < len(drawn["sparse"].times) <= STEPS
    assert len(drawn["draft_lv"].times) == 4  # one plan, with new noise every time


def test_only_rewards_that_plans_share_are_kept(studied, trajectory):
    draft_lv = section("draft_lv")
    plan = draft_lv.plan(trajectory.sigmas, None)
    earlier, later = (studied.gradients(trajectory, draft_lv, plan, draw) for draw in (0, 1))
    fresh = studied.gradients(replace(trajectory, gradients={}), draft_lv, plan, 1)
    assert torch.equal(later, fresh)
    assert not torch.allclose(later, earlier)


def test_repeated_plans_count_as_often_as_they_are_drawn(studied, trajectory):
    sparse = section("sparse", active_steps=1, late_bias=0)
    drawn = studied.drawn(trajectory, sparse, 4, lambda _: None)
    seed = studied.config.train.seed
    plans = [sparse.plan(trajectory.sigmas, generator_of(seed, draw, "plan")) for draw in range(4)]
    assert len(set(plans)) < 4
    rows = torch.stack([studied.gradients(trajectory, sparse, plan, 0) for plan in plans])
    torch.testing.assert_close(drawn.moments.mean[:-1], rows.mean(0))
    torch.testing.assert_close(drawn.moments.mean[-1], rows.mean((0, 1)))
    torch.testing.assert_close(drawn.moments.variance[:-1], rows.var(0).sum(1))
    torch.testing.assert_close(drawn.moments.variance[-1], rows.mean(1).var(0).sum())


def test_growth_has_the_methods_that_go_with_the_length(studied):
    methods = {"sparse": section("sparse", active_steps=2), "lagrange": section("lagrange"), "full": EXACT}
    growth = studied.growth(2, methods, 2, lambda _: None)
    assert set(growth.norms) == set(growth.sample_norms) == {"sparse", "full"}  # no (k, j) in two steps by this rule
    assert min(growth.norms.values()) > 0
    assert len(growth.chain) == SAMPLES


def test_a_lagrange_leap_of_order_k_is_exact_for_a_polynomial_of_degree_k_minus_one():
    sigmas = torch.linspace(1, 0, 8, dtype=torch.float64) ** 1.5
    for k in (1, 2, 3, 4):
        factors = torch.randn(k, 3, 4, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        velocities = {i: sum(a * s**p for p, a in enumerate(factors)) for i, s in enumerate(sigmas[:-1])}
        latents = {i: sum(a * s ** (p + 1) / (p + 1) for p, a in enumerate(factors)) for i, s in enumerate(sigmas)}
        errors = Trajectory(sigmas, latents, velocities).connector_errors()
        assert len(errors) == 4 * 6
        for (order, length), error in errors.items():
            if min(order, length) >= k:
                assert error == pytest.approx(0, abs=1e-12)
            else:
                assert error > 1e-4


def test_a_sample_without_gradient_is_named(studied, trajectory, monkeypatch):
    monkeypatch.setattr(studied, "score", lambda latents, _: latents * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))
    with pytest.raises(ValueError, match=r"the objective of sample 1 \('.+'\) does not change with its picture"):
        studied.chain(replace(trajectory, gradients={}))


def test_the_configured_settings_stand_in_for_the_published_ones():
    config = load(CONFIG, [])
    methods, wrong = methods_of(config)
    assert list(methods) == [
        "refl", "draft_lv", "drtune", "leapalign", "sparse", "bridge", "lagrange",
        "truncated_1", "truncated_4", "truncated_12", "randomised_truncation", "full",
    ]  # fmt: skip
    assert not wrong
    assert methods["sparse"] == config.surrogate
    published = load(CONFIG, ["surrogate={method: leapalign, alpha: 0.7}"])
    assert methods_of(published)[0]["leapalign"] == published.surrogate
    assert methods["leapalign"].settings() != published.surrogate.settings()
    assert [name for name, s in methods.items() if not s.detach_negative] == ["leapalign"]
    composed = "surrogate={method: composed, reward_input: sampled, active: all, weights: euler, bridge: none}"
    assert list(methods_of(load(CONFIG, [composed]))[0])[-2:] == ["composed", "full"]


def test_a_method_that_does_not_go_with_the_steps_is_left_out_and_named():
    methods, wrong = methods_of(load(CONFIG, ["sampling.steps=6"]))
    assert "refl" not in methods
    assert [w for w in wrong if "refl is left out" in w and "last_n_steps is 11" in w] == wrong
    assert {"truncated_1", "truncated_4", "truncated_6"} <= set(methods)


def test_samples_are_those_that_training_starts_with(studied, trajectory):
    config = studied.config.model_copy(update={"train": studied.config.train.model_copy(update={"batch": 4})})
    policy = list(Weights(studied.backbone.transformer).chunks(torch.float32))
    block = Sampler(config, read_prompts(config.prompts), lambda _: policy)({"number": np.array([0])})
    assert block["prompt"].tolist()[:SAMPLES] == studied.prompts
    np.testing.assert_allclose(block["inputs"][:SAMPLES, 0], trajectory.latents[STEPS], rtol=1e-4, atol=1e-4)


def test_the_model_is_the_one_that_a_train_worker_has(tiny_pipeline):
    given = [*SETTINGS, f"sampling.steps={STEPS}", f"model.path={tiny_pipeline}", "train.gradient_checkpointing=true"]
    assert Study(load(CONFIG, given), SAMPLES, towards_zero).backbone.transformer.is_gradient_checkpointing
