"""Runs a vLLM engine in this process alone, each request with parameters of its own, and writes its answers as JSON.

    python run_sampling.py OUT.json < JOB.json

A job has `model`, `engine` (vLLM's arguments) and `rounds`: lists of requests that are decoded together, each with
`prompt` (token ids), `sampling` (vLLM's parameters) and perhaps `constraint` (vLLM's structured outputs). An answer has
`text`, `token_ids`, `finish_reason`, and `logprobs`: the token id, log-probability and rank of every entry, position by
position, or null where none were asked for. A job with `unpatched` runs vLLM's sampler as it is.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def run(job: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Starts the engine and decodes round after round."""
    if job.get("unpatched"):
        from yuan_grpc.model.patches import logprob_token_ids

        logprob_token_ids.apply = lambda: None
    from vllm import LLM, TokensPrompt

    llm = LLM(job["model"], **job["engine"])
    answers = []
    for requests in job["rounds"]:
        prompts = [TokensPrompt(prompt_token_ids=request["prompt"]) for request in requests]
        sampling = [_sampling(**request) for request in requests]
        answers.append([_answer(output) for output in llm.generate(prompts, sampling, use_tqdm=False)])
    return answers


def _sampling(prompt: list[int], sampling: dict[str, Any], constraint: dict[str, Any] | None = None) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    return SamplingParams(**sampling, structured_outputs=constraint and StructuredOutputsParams(**constraint))


def _answer(output: Any) -> dict[str, Any]:
    (choice,) = output.outputs
    return {
        "text": choice.text,
        "token_ids": list(choice.token_ids),
        "finish_reason": choice.finish_reason,
        "logprobs": choice.logprobs and _positions(choice.logprobs),
    }


def _positions(found: Any) -> list[list[tuple[int, float, int]]]:
    entries = list(zip(found.token_ids, found.logprobs, found.ranks, strict=True))
    return [entries[start:end] for start, end in zip(found.start_indices, found.end_indices, strict=True)]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run(json.load(sys.stdin))))
