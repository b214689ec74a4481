"""Rewards with deployments of their own on a real local Ray cluster, against one graph in this process."""

from pathlib import Path

import numpy as np
import pytest
import torch
from odd_rewards import brightness, sharpness
from ray import serve

from flowbp_ray import shapes
from flowbp_ray.backbones.sd3 import SD3Backbone
from flowbp_ray.config import ConfigError, load
from flowbp_ray.rewards.clip import CLIPScore
from flowbp_ray.rollouts.asking import GivenUpError, Request
from flowbp_ray.rollouts.stages import service
from pipelines.rewarding import check_application
from serve.rewards import application, here

PROMPTS = ["a red ring", "three circles", "a blue square left of a cross"]
CONFIG = Path(__file__).parents[2] / "configs" / "shapes" / "sparse.yaml"
OWN = "{replicas: 2, cpus: 0.1}"

pytestmark = pytest.mark.slow

COMPONENTS = (
    f"{{name: preference, path: shapes/reward, weight: 1, clip: 10, deployment: {OWN}}}",
    f'{{name: sharp, kind: function, path: "odd_rewards:sharpness", weight: 0.5, deployment: {OWN}}}',
    '{name: bright, kind: function, path: "odd_rewards:brightness", weight: 2}',
    f'{{name: odd, kind: function, path: "odd_rewards:Breaking", weight: 0, deployment: {OWN}}}',
)


def configured(*overrides):
    return load(CONFIG, [f"reward.components=[{', '.join(COMPONENTS)}]", "cluster.reward_cpus=0.1", *overrides])


@pytest.fixture(scope="module")
def rewards(cluster):
    serve.run(application(configured("cluster.reward_replicas=2")), name="composed", route_prefix=None)
    yield service("composed")
    serve.delete("composed")


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).standard_normal((3, 4, 16, 16)).astype(np.float32)


def ask(rewards, method, values, prompts, *more, within=120.0):
    return Request(rewards, method, values, prompts, *more, what="scoring", prompts=prompts, within=within).result()


def whole_graph(latents, prompts, weights=(1.0, 0.5, 2.0)):
    """The objective and its gradient by one graph from latents to the sum."""
    x = torch.from_numpy(latents).requires_grad_()
    pictures = SD3Backbone.from_pretrained(shapes.BASE).decode(x)
    parts = [
        CLIPScore(shapes.REWARD)(pictures, prompts).clamp(max=10),
        sharpness(pictures, prompts),
        brightness(pictures, prompts),
    ]
    total = sum(w * p for w, p in zip(weights, parts, strict=True))
    return total.detach().numpy(), torch.autograd.grad(total.sum(), x)[0].numpy()


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def test_three_rewards_in_three_places_give_the_whole_graphs_gradient(rewards, latents):
    answer = ask(rewards, "score", latents, PROMPTS)
    value, gradient = whole_graph(latents, PROMPTS)
    assert relative(answer["objective"], value) < 1e-5
    assert relative(answer["gradient"], gradient) < 1e-4
    assert list(answer["components"]) == ["preference", "sharp", "bright", "odd"]


def test_weights_are_the_requests(rewards, latents):
    answer = ask(rewards, "score", latents, PROMPTS, {"preference": 0.0, "sharp": 3.0})
    value, gradient = whole_graph(latents, PROMPTS, (0.0, 3.0, 0.0))
    assert relative(answer["objective"], value) < 1e-5
    assert relative(answer["gradient"], gradient) < 1e-4
    assert "bright" in answer["components"]  # scored, but an asker that does not know of it has it not in its objective
    nothing = ask(rewards, "score", latents, PROMPTS, {"preference": 0.0, "sharp": 0.0, "bright": 0.0})
    assert not nothing["gradient"].any()


def test_concurrent_requests_get_their_own_answers(rewards, latents):
    alone = [ask(rewards, "score", latents[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
    asked = [
        Request(rewards, "score", latents[i % 3 :][:1], PROMPTS[i % 3 :][:1], what="scoring", prompts=PROMPTS) for i in range(24)
    ]
    for i, request in enumerate(asked):
        answer = request.result()
        np.testing.assert_array_equal(answer["gradient"], alone[i % 3]["gradient"])
        np.testing.assert_array_equal(answer["objective"], alone[i % 3]["objective"])


def test_a_replica_that_does_not_answer_in_time_is_not_waited_for(rewards, latents, tmp_path):
    odd = serve.get_deployment_handle("reward-odd", "composed")
    pictures, prompts = np.zeros((1, 3, 8, 8), np.float32), [f"hang {tmp_path / 'hung'}"]
    scores, gradient = ask(odd, "grade", pictures, prompts, 0.0, within=3.0)
    assert (tmp_path / "hung").exists()
    assert scores == 0
    assert gradient is None


@pytest.mark.parametrize("how", ["nan", "raise", "exit"])
def test_what_one_replica_fails_at_is_asked_of_the_other_while_others_ask(rewards, latents, tmp_path, how):
    marker = tmp_path / "broken"
    prompts = [f"{how} {marker}", *PROMPTS[1:]]
    fine = ask(rewards, "score", latents, PROMPTS)
    others = [Request(rewards, "score", latents, PROMPTS, what="scoring", prompts=PROMPTS) for _ in range(6)]
    answer = ask(rewards, "score", latents, prompts)
    assert marker.exists()  # so one replica did break
    np.testing.assert_array_equal(answer["components"]["odd"], fine["components"]["odd"])
    for other in others:
        np.testing.assert_array_equal(other.result()["gradient"], fine["gradient"])


def test_what_fails_everywhere_ends_in_a_sentence_that_names_the_reward_and_the_prompts(rewards, latents):
    prompts = ["always", *PROMPTS[1:]]
    with pytest.raises(GivenUpError) as found:
        ask(rewards, "score", latents, prompts)
    every = "['always', 'three circles', 'a blue square left of a cross']"
    assert str(found.value) == f"the reward 'odd' is not finite for the prompts {every} (3 tries)"


def test_pictures_are_scored_as_they_are(rewards, latents):
    seen = ask(rewards, "look", latents, PROMPTS)
    again = ask(rewards, "judge", seen["pictures"], PROMPTS)
    images = torch.from_numpy(seen["pictures"]).permute(0, 3, 1, 2) / 255
    np.testing.assert_allclose(again["preference"], CLIPScore(shapes.REWARD)(images, PROMPTS), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(again["sharp"], sharpness(images, PROMPTS), rtol=1e-5)
    np.testing.assert_allclose(seen["components"]["sharp"], again["sharp"], rtol=0.05)  # before they had 256 levels
    with pytest.raises(ValueError, match=r"pictures are float32 \(3, 4, 16, 16\), but 3 prompts need uint8 \(3, H, W, 3\)"):
        ask(rewards, "judge", latents, PROMPTS)


def test_a_decoder_for_less_memory_gives_the_same_gradient(latents):
    plain = ["reward.components.0.deployment=null", "reward.components.1.deployment=null", "reward.components.3.deployment=null"]
    saved = here(configured(*plain, "reward.decoder=checkpointed")).score(latents, PROMPTS)
    assert relative(saved["gradient"], here(configured(*plain)).score(latents, PROMPTS)["gradient"]) < 1e-4


def test_an_alignment_asks_a_running_application_only_if_that_scores_as_it_says(rewards):
    check_application(configured(), "composed")
    with pytest.raises(ConfigError, match=r"reward.application is 'other', but on this cluster Ray Serve runs .*composed"):
        check_application(configured(), "other")
    with pytest.raises(
        ConfigError, match=r"the component 'preference' is .*'clip': 9.*, and in the reward application 'composed' "
    ):
        check_application(configured("reward.components.0.clip=9"), "composed")
    with pytest.raises(ConfigError, match="'composed' has the decoder plain, this configuration checkpointed"):
        check_application(configured("reward.decoder=checkpointed"), "composed")
