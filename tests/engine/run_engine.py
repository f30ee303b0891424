"""Runs a vLLM engine on a checkpoint, in this process alone, and writes what it generated as JSON.

    python run_engine.py OUT.json < JOB.json

A job has `model`, `engine` (vLLM's arguments) and `rounds`: lists of prompts (token ids) that are decoded together,
greedily, `tokens` tokens each. An engine that does not start gives `{"error": "…"}`.
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

    try:
        llm = LLM(job["model"], disable_log_stats=False, **job["engine"])
    except Exception as error:
        return {"error": str(error)}
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], logprobs=0, ignore_eos=True)
    rounds = []
    for prompts in job["rounds"]:
        outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False)
        rounds.append([_answer(output) for output in outputs])
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return {"rounds": rounds, "preemptions": counters["vllm:num_preemptions"]}


def _answer(output: Any) -> dict[str, Any]:
    (choice,) = output.outputs
    return {
        "token_ids": list(choice.token_ids),
        "logprobs": [ranked[token].logprob for ranked, token in zip(choice.logprobs, choice.token_ids, strict=True)],
        "cached": output.num_cached_tokens,
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run(json.load(sys.stdin))))
