"""Runs a vLLM engine on a checkpoint, in this process alone, and writes what it generated as JSON.

    python run_engine.py OUT.json < JOB.json

A job has `model`, `engine` (vLLM's arguments) and `rounds`: lists of prompts (token ids) that are decoded together,
greedily, `tokens` tokens each. An engine that does not start gives `{"error": "…"}`. It may have `n`, how many answers
each prompt gets, one after the other; `sleep`, the levels at which it sleeps before each later round; `load`, folders
of adapters to load first, and `adapters`, the folder or null for each prompt of every round.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Starts the engine and decodes round after round."""
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    try:
        llm = LLM(job["model"], disable_log_stats=False, **job["engine"])
    except Exception as error:
        return {"error": str(error)}
    n = job.get("n", 1)
    greedy = {"temperature": 0} if n == 1 else {"temperature": 1, "top_k": 1}  # vLLM wants several to be drawn
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
        adapters = [requests.get(folder) for folder in job.get("adapters", [None] * len(prompts))]
        tokens = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        outputs = llm.generate(tokens, sampling, use_tqdm=False, lora_request=adapters)
        rounds.append([_answer(output, choice) for output in outputs for choice in output.outputs])
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    counted = {
        "preemptions": counters["vllm:num_preemptions"],
        "drafted": counters.get("vllm:spec_decode_num_draft_tokens", 0),
        "accepted": counters.get("vllm:spec_decode_num_accepted_tokens", 0),
    }
    return {"rounds": rounds, "errors": errors, "loaded": loaded} | counted


def _sleep(llm: Any, level: int) -> None:
    """Gives the GPU's memory back and takes it again; what of level 2 is gone is read again."""
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


def _answer(output: Any, choice: Any) -> dict[str, Any]:
    return {
        "token_ids": list(choice.token_ids),
        "logprobs": [ranked[token].logprob for ranked, token in zip(choice.logprobs, choice.token_ids, strict=True)],
        "cached": output.num_cached_tokens,
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run(json.load(sys.stdin))))
