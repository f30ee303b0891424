"""Runs a vLLM engine on requests with individual sampling parameters and writes the results as JSON.

    python run_sampling.py OUT.json < JOB.json

A job has `model`, `engine` (vLLM's arguments) and `rounds`: lists of requests that are decoded together, each with
`prompt` (token ids), `sampling` (vLLM's parameters) and optionally `constraint` (vLLM's structured outputs). A result
has `text`, `token_ids`, `finish_reason` and `logprobs`: token id, log-probability and rank of every entry for each
position, or null if none were requested. A job with `unpatched` runs vLLM's own sampler. The engine runs in this
process.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def run(job: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Start the engine and decode each round."""
    if job.get("unpatched"):
        from yuan_grpc.model.patches import logprob_token_ids

        logprob_token_ids.apply = lambda: None
    from vllm import LLM, TokensPrompt

    llm = LLM(job["model"], **job["engine"])
    results = []
    for requests in job["rounds"]:
        prompts = [TokensPrompt(prompt_token_ids=request["prompt"]) for request in requests]
        sampling = [_sampling(**request) for request in requests]
        results.append([_result(output) for output in llm.generate(prompts, sampling, use_tqdm=False)])
    return results


def _sampling(prompt: list[int], sampling: dict[str, Any], constraint: dict[str, Any] | None = None) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

    if detection := sampling.get("repetition_detection"):
        sampling = sampling | {"repetition_detection": RepetitionDetectionParams(**detection)}
    return SamplingParams(**sampling, structured_outputs=constraint and StructuredOutputsParams(**constraint))


def _result(output: Any) -> dict[str, Any]:
    (choice,) = output.outputs
    return {
        "text": choice.text,
        "token_ids": list(choice.token_ids),
        "finish_reason": choice.finish_reason,
        "logprobs": choice.logprobs and _positions(choice.logprobs),
    }


def _positions(logprobs: Any) -> list[list[tuple[int, float, int]]]:
    entries = list(zip(logprobs.token_ids, logprobs.logprobs, logprobs.ranks, strict=True))
    return [entries[start:end] for start, end in zip(logprobs.start_indices, logprobs.end_indices, strict=True)]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(run(json.load(sys.stdin))))
