"""Which stage the others wait for: the part of their time that samplers, rewards and train workers waited."""

import statistics

from flowbp_ray.config import AlignConfig

FIRST = 3  # steps left out where there are more: the first fill the stream and load what is loaded late
#: What a person makes more of.
SETTINGS = {"samplers": "cluster.samplers", "rewards": "cluster.reward_replicas", "train workers": "train.workers"}


def waits(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Of each stage's processes, the part of their time without work, 0…1; from a run's seconds by stage, a value a step.

    A sampler loads policies and samples, a train worker differentiates and publishes. With fewer than so many steps, all count.
    """
    if not seconds:
        return {}
    steps = len(seconds["step"])
    total = {k: statistics.mean(v[FIRST:] if steps > FIRST else v) for k, v in seconds.items()}
    busy = {
        "samplers": (total["loading"] + total["sampling"], total["sampling_waiting"]),
        "rewards": (total["reward"], total["reward_waiting"]),
        "train workers": (total["step"] - total["waiting"], total["waiting"]),
    }
    return {stage: idle / (work + idle) if work + idle else 0.0 for stage, (work, idle) in busy.items()}


def advice(config: AlignConfig, waited: dict[str, float]) -> str:
    """A sentence: how long each waited, and what more processes would help."""
    shares = ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in waited.items())
    busiest = min(waited, key=lambda stage: waited[stage])
    if config.train.policy_lag == 0:
        return f"{shares} of their time; {busiest} least. At train.policy_lag 0 they wait for each other: 1 overlaps them"
    shared = config.reward.application if busiest == "rewards" else None
    setting = f"of the application {shared!r}" if shared else SETTINGS[busiest]
    return f"{shares} of their time; {busiest} least, so more of them ({setting}) help first, given cores for them"
