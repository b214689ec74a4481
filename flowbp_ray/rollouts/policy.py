"""The policy store: one small actor between the trainer, which publishes versions, and the samplers, which load them."""

import asyncio

from flowbp_ray.rollouts.batches import Policy


class PolicyStore:
    """Keeps the newest ``keep`` versions; whoever needs one that is still to come waits here and not in a sampler."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.policies: dict[int, Policy] = {}
        self.published = asyncio.Condition()

    async def publish(self, policy: Policy) -> None:
        """Add the next version; ValueError if it is not the next."""
        newest = max(self.policies, default=policy.version - 1)
        if policy.version != newest + 1:
            raise ValueError(f"policy version {policy.version} cannot follow version {newest}")
        async with self.published:
            self.policies[policy.version] = policy
            self.policies.pop(policy.version - self.keep, None)
            self.published.notify_all()

    async def admit(self, version: int) -> None:
        """Return when ``version`` exists."""
        async with self.published:
            await self.published.wait_for(lambda: max(self.policies, default=-1) >= version)

    async def fetch(self, version: int) -> Policy:
        """A version that exists; KeyError if it is still to come or no longer kept."""
        if version not in self.policies:
            raise KeyError(f"policy version {version} is not here, only {sorted(self.policies)}")
        return self.policies[version]
