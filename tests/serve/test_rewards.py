"""The reward service on a real local Ray cluster, against the same objective in this process."""

import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from ray import serve
from ray.serve.config import AutoscalingConfig

from flowbp_ray import shapes
from flowbp_ray.backbones.sd3 import SD3Backbone
from flowbp_ray.config import load
from flowbp_ray.config.reward import Replicas
from flowbp_ray.pictures import to_uint8
from flowbp_ray.rewards.clip import CLIPScore
from flowbp_ray.rewards.objective import Component, objective
from serve.rewards import RewardModel, application, deployed

PROMPTS = ["a red ring", "three circles", "a blue square left of a cross"]
CONFIG = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"


@pytest.fixture(scope="module")
def service(cluster):
    overrides = ["cluster.reward_cpus=0.1", "cluster.reward_replicas=2"]
    handle = serve.run(application(load(CONFIG, overrides)), name="rewards", route_prefix=None)
    yield handle
    serve.delete("rewards")


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).standard_normal((3, 4, 16, 16)).astype(np.float32)


def ask(service, latents, prompts):
    return service.score.remote(latents, prompts).result(timeout_s=120)


def test_replicas_come_and_go_within_their_bounds():
    scaling = deployed(RewardModel, "one", Replicas(replicas=1, max_replicas=4), at_once=3)._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 3)
    assert deployed(RewardModel, "one", Replicas(replicas=2))._deployment_config.autoscaling_config is None


def test_a_replica_comes_under_requests_and_goes_without_them_and_the_answers_are_the_same(cluster, latents, monkeypatch):
    soon = {"upscale_delay_s": 0.1, "downscale_delay_s": 1, "look_back_period_s": 1, "metrics_interval_s": 0.2}
    monkeypatch.setattr("serve.rewards.AutoscalingConfig", partial(AutoscalingConfig, **soon))
    config = load(CONFIG, ["cluster.reward_cpus=0.1", "cluster.reward_max_replicas=2"])
    handle = serve.run(application(config), name="elastic", route_prefix=None)

    def replicas():
        assert time.monotonic() < until
        return serve.status().applications["elastic"].deployments["Rewards"].replica_states.get("RUNNING", 0)

    until = time.monotonic() + 240
    answers = [ask(handle, latents, PROMPTS)]
    assert replicas() == 1
    while replicas() < 2:
        answers += [response.result(timeout_s=120) for response in [handle.score.remote(latents, PROMPTS) for _ in range(8)]]
    while replicas() > 1:  # with one request at a time
        answers.append(ask(handle, latents, PROMPTS))
    answers.append(ask(handle, latents, PROMPTS))
    serve.delete("elastic")
    assert len(answers) > 10
    for answer in answers:
        np.testing.assert_array_equal(answer["gradient"], answers[0]["gradient"])
        np.testing.assert_array_equal(answer["objective"], answers[0]["objective"])


def test_the_service_answers_what_the_objective_is_here(service, latents):
    answer = ask(service, latents, PROMPTS)
    components = [Component("preference", CLIPScore(shapes.REWARD), 1.0), Component("judge", CLIPScore(shapes.JUDGE), 0.0)]
    here = objective(torch.from_numpy(latents), PROMPTS, SD3Backbone.from_pretrained(shapes.BASE).decode, components)
    assert set(answer["components"]) == {"preference", "judge"}
    for name, values in here.components.items():
        np.testing.assert_allclose(answer["components"][name], values, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(answer["objective"], here.objective, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(answer["gradient"], here.gradient, rtol=1e-3, atol=1e-5)
    assert np.abs(answer["gradient"]).max() > 1e-3


def test_a_look_gives_the_decoded_pictures_and_the_same_scores(service, latents):
    seen, answer = service.look.remote(latents, PROMPTS).result(timeout_s=120), ask(service, latents, PROMPTS)
    for name, values in answer["components"].items():
        np.testing.assert_allclose(seen["components"][name], values, rtol=1e-5)
    here = SD3Backbone.from_pretrained(shapes.BASE).decode(torch.from_numpy(latents))
    assert seen["pictures"].dtype == np.uint8
    assert np.abs(seen["pictures"] - to_uint8(here).astype(int)).max() <= 1


def test_concurrent_requests_get_their_own_answers(service, latents):
    alone = [ask(service, latents[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
    pending = [service.score.remote(latents[i % 3 :][:1], PROMPTS[i % 3 :][:1]) for i in range(12)]
    for i, response in enumerate(pending):
        answer = response.result(timeout_s=120)
        np.testing.assert_array_equal(answer["gradient"], alone[i % 3]["gradient"])
        np.testing.assert_array_equal(answer["objective"], alone[i % 3]["objective"])


def test_a_latent_that_is_not_finite_is_an_error_that_names_its_prompt(service, latents):
    broken = latents.copy()
    broken[1] = np.nan
    with pytest.raises(Exception, match=r"the reward 'preference' is not finite for the prompts \['three circles'\]"):
        ask(service, broken, PROMPTS)


def test_a_wrong_shape_is_an_error_that_says_which(service, latents):
    with pytest.raises(Exception, match=r"latents are \(3, 4, 16, 16\), but 2 prompts need \(2, 4, h, w\)"):
        ask(service, latents, PROMPTS[:2])
