"""An alignment in one process and one loop: the same classes, without Ray."""

import numpy as np

from flowbp_ray.rollouts.batches import MicroBatch
from flowbp_ray.rollouts.prompts import read_prompts
from flowbp_ray.rollouts.sampler import Sampler
from flowbp_ray.training.learner import Learner
from serve.rewards import here


def align_here(config):
    """The learner after all steps, and the objective's mean at each."""
    learner, rewards = Learner(config), here(config)
    policies = {0: list(learner.policy())}
    sampler = Sampler(config, read_prompts(config.prompts), policies.__getitem__)
    parts = config.train.batch // config.train.micro_batch
    objectives = []
    for step in range(config.train.steps):
        scores = []
        for number in range(step * parts, (step + 1) * parts):
            assert MicroBatch.of(config, number).step == step
            block = sampler({"number": np.array([number])})
            answer = rewards.score(block["inputs"][:, 0], block["prompt"].tolist())
            learner.accumulate(block | {"gradients": answer["gradient"][:, None]})
            scores.append(answer["objective"])
        learner.update()
        policies[learner.version] = list(learner.policy())
        objectives.append(float(np.concatenate(scores).mean()))
    return learner, objectives
