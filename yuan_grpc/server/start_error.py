"""The error that ends a start. Its module is light, because commands that need only the client import it too."""


class StartError(Exception):
    """The cause that keeps a server from starting, in one line, with what to do."""
