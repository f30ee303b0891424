"""The pace of the engine: the least time that tokens take."""

FORGET = 1.02
"""Factor by which a slower request moves the estimate, so that one fast request does not count forever."""


class Pace:
    """The seconds for a token of the fastest recent request."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def observe(self, tokens: float, seconds: float) -> None:
        """Record a finished request: the tokens of one of its sequences, and the time from its turn to its end."""
        if tokens > 0:
            pace = seconds / tokens
            self._seconds = min(pace, self._seconds * FORGET) if self._seconds else pace

    def least_seconds(self, tokens: int) -> float:
        """Return a time that a sequence of this many tokens takes at least; 0 if unknown."""
        return self._seconds * tokens
