"""A check that a model on the Hugging Face hub exists, before vLLM tries to reach it for half a minute."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from yuan_grpc.server.start_error import StartError

TIMEOUT_SECONDS = 5
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def local_folder(model: str, flags: Mapping[str, str]) -> Path | None:
    """Return the folder of a model, or None for one on the hub that is not in the hub's cache.

    Raises:
        StartError: there is neither a folder nor a model on the hub.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise StartError(f"--model must be a folder, not the file {model}")
    if not _ID.fullmatch(model) or Path(model).parent.is_dir():
        raise StartError(f"--model must be an existing folder or a hub id such as IEITYuan/Yuan2-2B-hf, not {model!r}")
    if os.environ.get("VLLM_USE_MODELSCOPE", "0").lower() in ("1", "true"):
        return None
    return _hub_folder(model, flags.get("--revision") or None)


def _hub_folder(model: str, revision: str | None) -> Path | None:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(cached := try_to_load_from_cache(model, "config.json", revision=revision), str):
        return Path(cached).parent
    if constants.HF_HUB_OFFLINE:
        raise StartError(f"{model} is neither a folder nor in the hub's cache, and HF_HUB_OFFLINE is set")
    try:
        HfApi().model_info(model, revision=revision, timeout=TIMEOUT_SECONDS)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403, 404):
            raise StartError(
                f"there is no folder {model}, and the hub has no such model that this user can read (status {status}): "
                "check the name, or set HF_TOKEN"
            ) from None
    except Exception as error:  # of the HTTP library, which differs between versions of huggingface_hub
        raise _unreachable(model, constants.ENDPOINT, error) from None
    return None


def _unreachable(model: str, endpoint: str, error: Exception) -> StartError:
    return StartError(
        f"there is no folder {model}, and the hub at {endpoint} cannot be reached ({error}): "
        "check the path, or set HF_ENDPOINT to a mirror"
    )
