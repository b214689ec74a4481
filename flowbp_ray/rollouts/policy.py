"""The policy store: one small actor between the trainer, which publishes versions, and the samplers, which load them.

It holds references alone. The weights lie where they were made, in Ray's object store, and go from there to the samplers
chunk by chunk: no process has more of them in passing than one chunk.
"""

import asyncio

from ray import ObjectRef


class PolicyStore:
    """Knows the chunks of the versions that may still be asked for, each version from ``publishers`` train workers, and when
    one that is still to come is there."""

    def __init__(self, publishers: int) -> None:
        self.publishers = publishers
        self.parts: dict[int, dict[int, list[ObjectRef]]] = {}
        self.published = asyncio.Condition()

    async def retire(self, before: int) -> None:
        """Let go of the versions ``before`` this one, so that their memory is free for the next."""
        for version in [v for v in self.parts if v < before]:
            del self.parts[version]

    async def publish(self, version: int, publisher: int, chunks: list[ObjectRef]) -> None:
        """Add one worker's part of a version, which exists when it has all of them; ValueError if another version is due."""
        newest = max(self.parts, default=version - 1)
        if version != newest + 1 and (version not in self.parts or publisher in self.parts[version]):
            raise ValueError(f"policy version {version} of train worker {publisher} cannot follow version {newest}")
        async with self.published:
            self.parts.setdefault(version, {})[publisher] = chunks
            self.published.notify_all()

    async def fetch(self, version: int) -> list[ObjectRef]:
        """The chunks of a version, when it exists; KeyError if it is no longer kept."""
        async with self.published:
            await self.published.wait_for(lambda: any(v >= version and self._whole(v) for v in self.parts))
        if not self._whole(version):
            raise KeyError(f"policy version {version} is not here, only {sorted(v for v in self.parts if self._whole(v))}")
        return [chunk for part in self.parts[version].values() for chunk in part]

    def _whole(self, version: int) -> bool:
        return len(self.parts.get(version, {})) == self.publishers
