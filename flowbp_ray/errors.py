"""Errors that processes without torch know too."""


class DeadRewardError(RuntimeError):
    """A reward gave a value or a gradient that is not finite; it is never taken for 0. The text names it and the prompts."""
