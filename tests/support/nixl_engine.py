"""A vLLM engine that hands prompts over to another one, or takes them, through NIXL.

    python nixl_engine.py

The first line of the standard input has the engine's arguments as JSON. Each further line has `prompts` (token ids),
`tokens`, the number of tokens to decode, and `transfers`: for each prompt the transfer parameters that the other engine
has returned, or null to prefill it for the other engine. For each, a line is printed with `answers`, `transfers` and
`loaded_tokens`, the number of tokens that were loaded so far.
"""

import json
import os
import sys
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


def serve() -> None:
    """Start the engine and answer until the end of the input."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's log
    from vllm import LLM

    llm = LLM(disable_log_stats=False, **json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        print(json.dumps(_answer(llm, **json.loads(line))), file=replies, flush=True)


def _answer(llm: Any, prompts: list[list[int]], transfers: list[dict[str, Any] | None], tokens: int) -> dict[str, Any]:
    from vllm import SamplingParams, TokensPrompt

    def sampling(transfer: dict[str, Any] | None) -> Any:
        params = {"kv_transfer_params": transfer or PREFILL}
        return SamplingParams(max_tokens=tokens, temperature=0, logprobs=0, ignore_eos=True, extra_args=params)

    requested = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    outputs = llm.generate(requested, [sampling(transfer) for transfer in transfers], use_tqdm=False)
    metrics = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return {
        "loaded_tokens": metrics["vllm:external_prefix_cache_hits"],
        "answers": [_result(output.outputs[0]) for output in outputs],
        "transfers": [output.kv_transfer_params for output in outputs],
    }


def _result(choice: Any) -> dict[str, Any]:
    return {
        "token_ids": list(choice.token_ids),
        "logprobs": [ranked[token].logprob for ranked, token in zip(choice.logprobs, choice.token_ids, strict=True)],
    }


if __name__ == "__main__":
    serve()
