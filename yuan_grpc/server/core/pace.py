"""The pace of the engine: the minimum time per token."""

RELAX = 0.9
"""Factor of the estimate after each refusal. Without it, a wrong estimate would refuse requests forever."""


class Pace:
    """The time per token of the fastest request so far."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def observe(self, tokens: float, seconds: float) -> None:
        """Record a finished request: the tokens of one of its sequences, and the time from its turn to its end."""
        if tokens > 0:
            self._seconds = min(self._seconds or seconds / tokens, seconds / tokens)

    def min_seconds(self, tokens: int) -> float:
        """Return the minimum time of a sequence of this many tokens; 0 if unknown."""
        return self._seconds * tokens

    def relax(self) -> None:
        """Lower the estimate, since a request was refused because of it."""
        self._seconds *= RELAX
