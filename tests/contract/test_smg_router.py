"""SMG's router in front of the server: it finds out the model, fetches the tokenizer, and serves OpenAI's API."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine, last, more
from ports import free_port
from servers import serve_grpc

from yuan_grpc.server.engine.types import EngineRequest, StepOutput
from yuan_grpc.server.grpc.health import Health
from yuan_grpc.server.grpc.servicer import NAME
from yuan_grpc.server.settings.mesh import MeshSettings

pytest.importorskip("smg", reason="needs SMG's router: pip install smg")
pytest.importorskip("smg_grpc_proto", reason="needs the messages: pip install smg-grpc-proto")
pytestmark = pytest.mark.timeout(60)

VOCABULARY = {chr(code): code for code in range(128)}
BODY = {"model": "fake", "prompt": "AB", "max_tokens": 8}


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are characters, as those of the fake engine."""
    split = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": split,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "?"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "yuan"}))


@asynccontextmanager
async def routed(engine: FakeEngine, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Serve an engine through the router; yield an HTTP client of the router that has a tokenizer."""
    write_tokenizer(folder)
    engine.info = replace(engine.info, path=str(folder), dtype="float32")
    health, port = Health(NAME), free_port()
    async with serve_grpc(engine, health, mesh=MeshSettings(vllm_engine=True)) as address:
        await health.set_serving()
        command = ["-m", "smg.launch_router", "--host", "127.0.0.1", "--port", str(port), "--worker-urls"]
        check_often = ["--worker-startup-check-interval", "1"]  # of a worker that did not answer; 30 s otherwise
        with (folder / "router.log").open("wb") as log:
            router = await asyncio.create_subprocess_exec(
                *(sys.executable, *command, f"grpc://{address}", *check_often),
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
            )
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
                await wait_until_served(client)
                yield client
        finally:
            router.kill()
            await router.wait()


async def wait_until_served(client: httpx.AsyncClient) -> None:
    """Return when the router has found the model and its tokenizer; the timeout of the test is the limit."""
    while True:
        try:
            if (await client.post("/v1/completions", json=BODY)).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.2)


async def test_the_router_serves_completions(tmp_path: Path) -> None:
    engine = FakeEngine(more("a"), last("b"))
    async with routed(engine, tmp_path) as client:
        workers = (await client.get("/workers")).json()["workers"]
        whole = (await client.post("/v1/completions", json=BODY | {"temperature": 0.5, "seed": 7})).json()
        stream = await client.post("/v1/completions", json=BODY | {"stream": True})
    assert [(worker["model_id"], worker["runtime_type"]) for worker in workers] == [("fake", "vllm")]
    assert workers[0]["models"][0]["context_length"] == engine.info.max_model_len
    assert whole["choices"][0]["text"] == "ab"
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"] == whole["usage"] | {"prompt_tokens": 2, "completion_tokens": 2}
    sampled = engine.requests[-2]
    assert (list(sampled.prompt), sampled.sampling.seed, sampled.sampling.max_tokens) == ([65, 66], 7, 8)
    events = [line.removeprefix("data: ") for line in stream.text.splitlines() if line.startswith("data: {")]
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events if '"choices":[{' in event) == "ab"


class EndlessEngine(FakeEngine):
    """An engine that generates until it is cancelled, once its script is empty.

    The router finds out that a caller has left when it sends him the next token, and not before.
    """

    async def generate(
        self, request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        if self.script:
            async for output in super().generate(request, stream=stream, deadline=deadline):
                yield output
            return
        yield StepOutput()
        self.began.set()
        try:
            while True:
                yield more("a")
                await asyncio.sleep(0.01)
        finally:
            self.freed.set()


async def test_a_caller_that_leaves_the_router_frees_its_engine_request(tmp_path: Path) -> None:
    engine = EndlessEngine(last("a"))
    async with routed(engine, tmp_path) as client:
        engine.script = ()
        engine.began.clear()
        engine.freed.clear()
        async with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response:
            await anext(response.aiter_lines())
            assert engine.began.is_set()
        await engine.freed.wait()
