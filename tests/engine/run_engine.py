"""Runs a vLLM engine on a checkpoint, in this process alone, and writes what it generated as JSON.

    python run_engine.py OUT.json < JOB.json

A job has `model`, `engine` (vLLM's arguments) and `rounds`: lists of prompts (token ids) that are decoded together,
greedily, `tokens` tokens each. An engine that does not start gives `{"error": "…"}`. It may have `load`, folders of
adapters to load first, and `adapters`, the folder or null for each prompt of every round.
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
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], logprobs=0, ignore_eos=True)
    folders = job.get("load", [])
    requests = {folder: LoRARequest(folder, number, folder) for number, folder in enumerate(folders, start=1)}
    errors = [_load(llm, request) for request in requests.values()]
    loaded = [folder for folder, request in requests.items() if request.lora_int_id in llm.llm_engine.list_loras()]
    rounds = []
    for prompts in job["rounds"]:
        adapters = [requests.get(folder) for folder in job.get("adapters", [None] * len(prompts))]
        tokens = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        outputs = llm.generate(tokens, sampling, use_tqdm=False, lora_request=adapters)
        rounds.append([_answer(output) for output in outputs])
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    counted = {
        "preemptions": counters["vllm:num_preemptions"],
        "drafted": counters.get("vllm:spec_decode_num_draft_tokens", 0),
        "accepted": counters.get("vllm:spec_decode_num_accepted_tokens", 0),
    }
    return {"rounds": rounds, "errors": errors, "loaded": loaded} | counted


def _load(llm: Any, request: Any) -> str | None:
    try:
        llm.llm_engine.add_lora(request)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _answer(output: Any) -> dict[str, Any]:
    (choice,) = output.outputs
    return {
        "token_ids": list(choice.token_ids),
        "logprobs": [ranked[token].logprob for ranked, token in zip(choice.logprobs, choice.token_ids, strict=True)],
        "cached": output.num_cached_tokens,
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run(json.load(sys.stdin))))
