"""Resolution of the names that requests give for the served model and its LoRA adapters."""

from collections.abc import Collection

from yuan_grpc.server.errors import ModelNotFoundError


def resolve_alias(name: str, aliases: Collection[str], served: str = "") -> str:
    """Return `served` for an alias of the served model, and any other name unchanged.

    Args:
        aliases: names without a slash at the end. A folder is an alias with and without it.
        served: the served model's name, or the empty name, which also selects it.
    """
    return served if (name.rstrip("/") or name) in aliases else name


def resolve_lora(name: str, served: str, loras: Collection[str]) -> str:
    """Return the loaded LoRA adapter that a name selects, or the empty name for the served model.

    Raises:
        ModelNotFoundError: neither the served model nor a loaded adapter has this name.
    """
    if name in ("", served):
        return ""
    if name not in loras:
        raise model_not_found(name, served)
    return name


def model_not_found(name: str, served: str) -> ModelNotFoundError:
    """Return the error for a name that neither the served model nor a loaded adapter has."""
    return ModelNotFoundError(f"`model` must be {served} or a loaded LoRA adapter, not {name:.256}")
