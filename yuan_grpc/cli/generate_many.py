"""Completion of many prompts, written as text or as JSON lines."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict

from yuan_grpc.cli.common.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    is_unreachable,
    print_call_error,
    print_failed_call,
)
from yuan_grpc.cli.common.output import Output
from yuan_grpc.cli.common.progress import Progress
from yuan_grpc.cli.common.signals import InterruptibleLoop
from yuan_grpc.cli.common.terminal import BOLD, colorize, is_terminal, print_error, print_note, sanitize_line
from yuan_grpc.client import AsyncClient, Completion, Result, YuanError
from yuan_grpc.v1 import yuan_pb2 as pb

TITLE_CHARACTERS = 60


class PromptBatch:
    """A batch of prompts, completed concurrently and written in their order."""

    def __init__(
        self, client: AsyncClient, requests: Sequence[pb.GenerateRequest], output: Output, options: argparse.Namespace
    ) -> None:
        self._client, self._requests, self._output, self._options = client, requests, output, options
        self._unwritten: dict[int, Result] = {}
        self._next = self._failed = self._tokens = 0
        self._last_error: YuanError | None = None
        self._progress = Progress("generating", len(requests), " prompts")

    def run(self, loop: InterruptibleLoop) -> int:
        """Complete all prompts and return the exit status."""
        start = time.monotonic()
        try:
            loop.run(self._generate())
        except KeyboardInterrupt:
            self._write(iter(sorted(self._unwritten)))
            print_error(f"cancelled: {self._next} of {len(self._requests)} prompts completed")
            return EXIT_INTERRUPTED
        self._print_summary(time.monotonic() - start)
        return EXIT_FAILURE if self._failed else 0

    async def _generate(self) -> None:
        # Unordered: with ordered=True, Ctrl-C would lose results that wait for an earlier prompt.
        results = self._client.generate_many(self._requests, concurrency=self._options.concurrency, ordered=False)
        with self._progress:
            async with self._client, contextlib.aclosing(results):
                async for result in results:
                    self._unwritten[result.index] = result
                    self._progress.advance()
                    self._write(self._ready_indices())

    def _ready_indices(self) -> Iterator[int]:
        while self._next in self._unwritten:
            yield self._next

    def _write(self, indices: Iterator[int]) -> None:
        for index in indices:
            result = self._unwritten[index]
            with self._progress.paused():
                self._write_result(index, result)
            del self._unwritten[index]
            self._next += 1

    def _write_result(self, index: int, result: Result) -> None:
        if result.completion:
            self._tokens += result.completion.usage.completion_tokens
        if result.error:
            self._failed += 1
            self._last_error = result.error
        if self._options.json:
            line = json.dumps(self._to_json(index, result), ensure_ascii=False)
            self._output.write(self._output.sanitize(line) + "\n")
        elif result.completion:
            self._output.write(self._format_choices(index, result.completion))
        elif result.error:
            self._print_failed_prompt(index, result.error)

    def _print_failed_prompt(self, index: int, error: YuanError) -> None:
        prefix = f"prompt {index + 1}: " if len(self._requests) > 1 else ""
        if not is_unreachable(error):
            print_call_error(error, prefix)
        elif prefix:  # the summary gives the reason
            print_error(f"{prefix}UNAVAILABLE: no server answered")

    def _to_json(self, index: int, result: Result) -> dict[str, Any]:
        request = self._requests[index]
        document: dict[str, Any] = {"index": index}
        if request_id := request.request_id or (result.error.request_id if result.error else ""):
            document["request_id"] = request_id
        if request.WhichOneof("input") == "prompt":
            document["prompt"] = request.prompt
        if result.completion:
            return document | _completion_to_json(result.completion)
        assert result.error
        return document | {"error": _error_to_json(result.error)}

    def _format_choices(self, index: int, completion: Completion) -> str:
        """Return the texts of all choices, each after a title line with its number and prompt."""
        sections = []
        for choice in completion.choices:
            number = f"{index + 1}.{choice.index + 1}" if len(completion.choices) > 1 else f"{index + 1}"
            title = f"[{number}] {_title(self._requests[index])}"
            sections.append(colorize(title, BOLD, self._output.stream) + f"\n{self._output.sanitize(choice.text)}\n\n")
        return "".join(sections)

    def _print_summary(self, seconds: float) -> None:
        total = len(self._requests)
        if self._failed and total > 1:
            print_error(f"{self._failed} of {total} prompts failed")
        if self._last_error and is_unreachable(self._last_error):
            print_failed_call(self._last_error, self._options)
        if is_terminal(sys.stderr):
            rate = self._tokens / max(seconds, 1e-9)
            print_note(f"[{total - self._failed} completed, {self._tokens} tokens, {rate:.1f} tokens/s]")


def _title(request: pb.GenerateRequest) -> str:
    """Return the start of the prompt as one line."""
    text = request.messages[-1].content if request.messages else request.prompt
    line = " ".join(sanitize_line(text).split()) or f"{len(request.prompt_token_ids.ids)} token ids"
    return line if len(line) <= TITLE_CHARACTERS else f"{line[: TITLE_CHARACTERS - 1]}…"


def _completion_to_json(completion: Completion) -> dict[str, Any]:
    """Return the common fields under stable names, and every optional field of the message that is set."""
    message = MessageToDict(completion.message, preserving_proto_field_name=True)
    first = completion.choices[0] if completion.choices else None
    document: dict[str, Any] = {
        "text": completion.text,
        "finish_reason": first.finish_reason if first else None,
        "usage": {
            "prompt_tokens": completion.usage.prompt_tokens,
            "completion_tokens": completion.usage.completion_tokens,
            "cached_tokens": completion.usage.cached_tokens,
        },
        "seed": completion.seed,
        "request_id": completion.request_id,
        "model": completion.model,
    }
    document["choices"] = [
        _choice_to_json(fields, choice.finish_reason, choice.index)
        for fields, choice in zip(message.get("choices", ()), completion.choices, strict=True)
    ]
    return document | {name: message[name] for name in message if name.startswith(("prompt_", "flat_prompt_"))}


def _choice_to_json(fields: dict[str, Any], finish_reason: str | None, index: int) -> dict[str, Any]:
    return {"index": index, "text": ""} | fields | {"finish_reason": finish_reason}


def _error_to_json(error: YuanError) -> dict[str, Any]:
    violations = [{"field": one.field, "description": one.description} for one in error.violations]
    return {"code": error.code.name, "reason": error.reason, "message": error.message, "violations": violations}
