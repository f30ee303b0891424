"""Preparation of the process that the engine processes of a test session are forked from."""

import gc
from importlib import import_module

from engine_forks import keep_fork_server

from yuan_grpc.server.engine.vllm import warm_fork

for module in warm_fork.preloaded():
    import_module(module)
warm_fork.use_context()
keep_fork_server()
gc.collect()
gc.freeze()
