"""What was asked for wrongly."""


class UsageError(ValueError):
    """A command cannot be run as it was asked for; the text says why."""
