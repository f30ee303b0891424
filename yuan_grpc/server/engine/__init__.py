"""The server's one door to vLLM."""

from yuan_grpc.server.engine.options import EngineOptions, read_engine_flags
from yuan_grpc.server.engine.vllm_engine import VllmEngine

__all__ = ["EngineOptions", "VllmEngine", "read_engine_flags"]
