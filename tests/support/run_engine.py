"""Runs a vLLM engine on rounds of prompts and writes the generated tokens as JSON.

    python run_engine.py OUT.json < JOB.json

A job has `model`, `engine` (vLLM's arguments) and `rounds`: lists of prompts (token ids) that are decoded together,
greedily, with `tokens` tokens each. Optional are `n`, the number of consecutive choices per prompt; `sleep`, the sleep
levels to use before the later rounds; `load`, folders of LoRA adapters to load first; `adapters`, the folder or null
for each prompt of every round; `priorities`, one per prompt, with which each prompt arrives a step after the previous
one; `unpatched`, the names of patches to leave out; `install`, modules of this folder whose `install` is called first;
and `reset`, whether the prefix cache is emptied before each round. The result of an engine that does not start is
`{"error": "…"}`. The engine runs in this process, and its parallel workers are forks, as those of the server are.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

PARALLEL = {"tensor_parallel_size", "pipeline_parallel_size"}

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Start the engine and decode each round."""
    for patch in job.get("unpatched", []):
        vars(import_module(f"yuan_grpc.model.patches.{patch}"))["apply"] = lambda: None
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    for module in job.get("install", []):
        import_module(module).install()
    if PARALLEL & job["engine"].keys():
        from yuan_grpc.server.engine.vllm import warm_fork

        warm_fork.start()
    try:
        llm = LLM(job["model"], disable_log_stats=False, **job["engine"])
    except Exception as error:
        return {"error": str(error)}
    n = job.get("n", 1)
    greedy = (
        {"temperature": 0} if n == 1 else {"temperature": 1, "top_k": 1}
    )  # vLLM requires sampling for several choices
    sampling = SamplingParams(n=n, max_tokens=job["tokens"], logprobs=0, ignore_eos=True, **greedy)
    folders = job.get("load", [])
    requests = {folder: LoRARequest(folder, number, folder) for number, folder in enumerate(folders, start=1)}
    errors = [_load(llm, request) for request in requests.values()]
    loaded = [folder for folder, request in requests.items() if request.lora_int_id in llm.llm_engine.list_loras()]
    rounds = []
    sleep = iter(job.get("sleep", []))
    for number, prompts in enumerate(job["rounds"]):
        if number and (level := next(sleep, None)):
            _sleep(llm, level)
        if job.get("reset"):
            _empty_prefix_cache(llm)
        adapters = [requests.get(folder) for folder in job.get("adapters", [None] * len(prompts))]
        tokens = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        if priorities := job.get("priorities"):
            outputs = _generate_in_turn(llm, tokens, sampling, priorities)
        else:
            outputs = llm.generate(tokens, sampling, use_tqdm=False, lora_request=adapters)
        rounds.append([_result(output, choice) for output in outputs for choice in output.outputs])
    metrics = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    counters = {
        "preemptions": metrics["vllm:num_preemptions"],
        "loaded_tokens": metrics.get("vllm:external_prefix_cache_hits", 0),
        "drafted": metrics.get("vllm:spec_decode_num_draft_tokens", 0),
        "accepted": metrics.get("vllm:spec_decode_num_accepted_tokens", 0),
    }
    return {"rounds": rounds, "errors": errors, "loaded": loaded} | counters


def _generate_in_turn(llm: Any, prompts: list[Any], sampling: Any, priorities: list[int]) -> list[Any]:
    """Run one step after each request is added, then all remaining steps; return the outputs in order."""
    engine, finished = llm.llm_engine, {}

    def step() -> None:
        finished.update({output.request_id: output for output in engine.step() if output.finished})

    names = [str(number) for number in range(len(prompts))]
    for name, prompt, priority in zip(names, prompts, priorities, strict=True):
        engine.add_request(name, prompt, sampling, priority=priority)
        step()
    while engine.has_unfinished_requests():
        step()
    return [finished[name] for name in names]


def _empty_prefix_cache(llm: Any) -> None:
    """Evict all blocks, once the steps that are still in flight have freed theirs."""
    while not llm.reset_prefix_cache():
        llm.llm_engine.step()


def _sleep(llm: Any, level: int) -> None:
    """Release the GPU's memory and allocate it again; level 2 discards the weights, so reload them."""
    llm.sleep(level)
    llm.wake_up(["weights"])
    if level == 2:
        llm.collective_rpc("reload_weights")
    llm.wake_up(["kv_cache"])


def _load(llm: Any, request: Any) -> str | None:
    try:
        llm.llm_engine.add_lora(request)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _result(output: Any, choice: Any) -> dict[str, Any]:
    return {
        "token_ids": list(choice.token_ids),
        "logprobs": [ranked[token].logprob for ranked, token in zip(choice.logprobs, choice.token_ids, strict=True)],
        "cached": output.num_cached_tokens,
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run(json.load(sys.stdin))))
