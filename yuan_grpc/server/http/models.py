"""`/v1/models`: the served model and the loaded adapters."""

from typing import Any

from yuan_grpc.server.engine.model_names import model_not_found
from yuan_grpc.server.http.call import AppState


def list_models(state: AppState) -> dict[str, Any]:
    """Return OpenAI's list of models."""
    return {"object": "list", "data": _models(state)}


def find_model(state: AppState, name: str) -> dict[str, Any]:
    """Return a model by its name. Aliases are for the bodies of the original scripts.

    Raises:
        ModelNotFoundError: no model and no adapter has this name.
    """
    models = _models(state)
    for model in models:
        if model["id"] == name:
            return model
    raise model_not_found(name, models[0]["id"])


def _models(state: AppState) -> list[dict[str, Any]]:
    """Return OpenAI model objects: the served model, then the loaded adapters.

    As in vLLM, `root` is the model's folder or its id on the hub: benchmarks load the tokenizer from there.
    """
    engine = state.service.engine
    info = engine.info
    common = {"object": "model", "created": state.created, "owned_by": "yuan-grpc", "max_model_len": info.max_model_len}
    adapters = [{"id": name, **common, "root": name, "parent": info.name} for name in engine.loras]
    return [{"id": info.name, **common, "root": info.path or info.name, "parent": None}, *adapters]
