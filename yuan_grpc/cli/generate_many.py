"""Many prompts, and their answers as text or as JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict

from yuan_grpc.cli.common import connection
from yuan_grpc.cli.common.connection import FAILED, INTERRUPTED
from yuan_grpc.cli.common.output import Output
from yuan_grpc.cli.common.progress import Progress
from yuan_grpc.cli.common.signals import Interruptible
from yuan_grpc.cli.common.terminal import BOLD, DIM, complain, is_terminal, painted, tell, visible
from yuan_grpc.client import AsyncClient, Completion, Result, YuanError
from yuan_grpc.v1 import yuan_pb2 as pb

TITLE_CHARACTERS = 60


class Many:
    """Many prompts, answered at the same time and written in their order."""

    def __init__(
        self, client: AsyncClient, requests: Sequence[pb.GenerateRequest], output: Output, options: argparse.Namespace
    ) -> None:
        self._client, self._requests, self._output, self._options = client, requests, output, options
        self._held: dict[int, Result] = {}
        self._next = self._failed = self._tokens = 0
        self._error: YuanError | None = None
        self._progress = Progress("answers", len(requests), " prompts")

    def run(self, loop: Interruptible) -> int:
        """Answers all; returns the exit status."""
        began = time.monotonic()
        try:
            loop.run(self._answer())
        except KeyboardInterrupt:
            self._write(iter(sorted(self._held)))
            complain(f"cancelled: {self._next} of {len(self._requests)} prompts were answered")
            return INTERRUPTED
        self._tell_end(time.monotonic() - began)
        return FAILED if self._failed else 0

    async def _answer(self) -> None:
        # Not in order: what waits for its turn must not be lost with Ctrl-C, and is kept here.
        results = self._client.generate_many(self._requests, concurrency=self._options.concurrency, ordered=False)
        with self._progress:
            async with self._client, contextlib.aclosing(results):
                async for result in results:
                    self._held[result.index] = result
                    self._progress.advance()
                    self._write(self._in_turn())

    def _in_turn(self) -> Iterator[int]:
        while self._next in self._held:
            yield self._next

    def _write(self, indices: Iterator[int]) -> None:
        for index in indices:
            result = self._held[index]
            with self._progress.aside():
                self._write_one(index, result)
            del self._held[index]
            self._next += 1

    def _write_one(self, index: int, result: Result) -> None:
        if result.answer:
            self._tokens += result.answer.usage.completion_tokens
        if result.error:
            self._failed += 1
            self._error = result.error
        if self._options.json:
            self._output.write(self._output.shown(json.dumps(self._line(index, result), ensure_ascii=False)) + "\n")
        elif result.answer:
            self._output.write(self._texts(index, result.answer))
        elif result.error:
            connection.tell_error(result.error, f"prompt {index + 1}: " if len(self._requests) > 1 else "")

    def _line(self, index: int, result: Result) -> dict[str, Any]:
        request = self._requests[index]
        line: dict[str, Any] = {"index": index}
        if request.request_id:
            line["request_id"] = request.request_id
        if request.WhichOneof("input") == "prompt":
            line["prompt"] = request.prompt
        if result.answer:
            return line | _answer(result.answer)
        assert result.error
        return line | {"error": _error(result.error)}

    def _texts(self, index: int, answer: Completion) -> str:
        """The texts of all choices, each below a line that says whose it is."""
        told = []
        for choice in answer.choices:
            number = f"{index + 1}.{choice.index + 1}" if len(answer.choices) > 1 else f"{index + 1}"
            title = f"[{number}] {_title(self._requests[index])}"
            told.append(painted(title, BOLD, self._output.stream) + f"\n{self._output.shown(choice.text)}\n\n")
        return "".join(told)

    def _tell_end(self, seconds: float) -> None:
        total = len(self._requests)
        if self._failed and total > 1:
            complain(f"{self._failed} of {total} prompts failed")
        if self._error:
            connection.suggest(self._error, self._options.address)
        if is_terminal(sys.stderr):
            rate = self._tokens / max(seconds, 1e-9)
            tell(f"[{total - self._failed} answers, {self._tokens} tokens, {rate:.1f} tokens/s]", DIM)


def _title(request: pb.GenerateRequest) -> str:
    """The beginning of a prompt, on a line."""
    text = request.messages[-1].content if request.messages else request.prompt
    line = " ".join(visible(text).split()) or f"{len(request.prompt_token_ids.ids)} token ids"
    return line if len(line) <= TITLE_CHARACTERS else f"{line[: TITLE_CHARACTERS - 1]}…"


def _answer(answer: Completion) -> dict[str, Any]:
    """An answer as JSON: its parts that every caller wants, and all of what only some ask for."""
    message = MessageToDict(answer.message, preserving_proto_field_name=True)
    first = answer.choices[0] if answer.choices else None
    told: dict[str, Any] = {
        "text": answer.text,
        "finish_reason": first.finish_reason if first else None,
        "usage": {
            "prompt_tokens": answer.usage.prompt_tokens,
            "completion_tokens": answer.usage.completion_tokens,
            "cached_tokens": answer.usage.cached_tokens,
        },
        "seed": answer.seed,
        "request_id": answer.request_id,
        "model": answer.model,
    }
    choices = [
        _choice(raw, choice.finish_reason, choice.index)
        for raw, choice in zip(message.get("choices", ()), answer.choices, strict=True)
    ]
    told["choices"] = choices
    return told | {name: message[name] for name in message if name.startswith(("prompt_", "flat_prompt_"))}


def _choice(raw: dict[str, Any], finish_reason: str | None, index: int) -> dict[str, Any]:
    return {"index": index, "text": ""} | raw | {"finish_reason": finish_reason}


def _error(error: YuanError) -> dict[str, Any]:
    violations = [{"field": one.field, "description": one.description} for one in error.violations]
    return {"code": error.code.name, "reason": error.reason, "message": error.message, "violations": violations}
