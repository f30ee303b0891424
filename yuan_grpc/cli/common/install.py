"""The commands that install the server."""

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""PyTorch's index of CPU builds. The package index has only builds for CUDA, and vLLM for CPUs requires the other."""

PIP_CPU = f"pip install 'yuan-grpc[cpu]' --extra-index-url {CPU_INDEX}"
UV_CPU = "uv pip install 'yuan-grpc[cpu]' --torch-backend cpu"
PIP_CUDA = "pip install 'yuan-grpc[cuda]'"


def missing_package(error: ModuleNotFoundError) -> str:
    """Return the message for a package of the server that is not installed."""
    package = (error.name or "vllm").partition(".")[0]
    return (
        f"the server is not installed ({package} is missing): for CPUs run `{PIP_CPU}` (with uv: `{UV_CPU}`), "
        f"for NVIDIA GPUs run `{PIP_CUDA}`"
    )
