"""Checks of a start that take milliseconds, made before vLLM is imported, which takes seconds."""

from importlib.util import find_spec

from yuan_grpc.preflight import addresses, checkpoint, flags, hub, machine, security
from yuan_grpc.server.settings import Settings


def check(settings: Settings) -> None:
    """Check addresses, certificates, tokens, model and machine.

    Raises:
        StartError: the start would fail later; the text has the cause and what to do.
    """
    addresses.check(settings)
    security.check(settings)
    check_engine(settings)


def check_engine(settings: Settings) -> None:
    """Check the model and the machine.

    Raises:
        StartError: as for `check`.
        ModuleNotFoundError: vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise ModuleNotFoundError("vLLM is not installed", name="vllm")
    values = flags.parse(settings.vllm_flags)
    flags.check(values)
    folder = hub.local_folder(settings.model, values)
    machine.check(values, checkpoint.check(folder, values) if folder else 0)
