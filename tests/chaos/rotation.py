"""Certificates and tokens that are replaced under load, and a stop under load."""

import asyncio
import os

import grpc
from certificates import Authority
from fake_server import Options
from http2 import REQUEST

from chaos.account import FINISHED, OWN_CONNECTION, Run, connect, read_all, stub_of
from yuan_grpc.server.security.identity import Scope
from yuan_grpc.server.security.tokens import create_token, format_line

LOOPS = 8


class _Secrets:
    """Files of a server with TLS and tokens, and the token that callers use."""

    def __init__(self, run: Run) -> None:
        self.authority = Authority()
        self._folder = run.folder
        self.certificate, self.key = self.authority.write(run.folder)
        self.tokens = run.folder / "tokens"
        self.token = create_token()
        self._write_tokens(self.token)

    def _write_tokens(self, *tokens: str) -> None:
        new = self._folder / "new-tokens"
        new.write_text("".join(format_line("alice", [Scope.GENERATE], token) + "\n" for token in tokens))
        os.replace(new, self.tokens)

    def replace_certificate(self) -> None:
        """Replace the certificate and then its key, so that they do not fit each other in between."""
        new = self._folder / "new"
        new.mkdir(exist_ok=True)
        for file, target in zip(self.authority.write(new), (self.certificate, self.key), strict=True):
            os.replace(file, target)

    def add_token(self) -> None:
        """Hand out a new token, next to which the old one is valid."""
        old, self.token = self.token, create_token()
        self._write_tokens(old, self.token)

    def remove_old_token(self) -> None:
        """Make the token that is handed out the only one."""
        self._write_tokens(self.token)


async def rotation(run: Run) -> None:
    """Ten certificates and ten tokens replace each other under load; no call fails."""
    secrets, begun, is_over = _Secrets(run), [0] * LOOPS, asyncio.Event()
    arguments = ("--tls-cert-file", str(secrets.certificate), "--tls-key-file", str(secrets.key))
    options = Options(limit=1000, arguments=(*arguments, "--token-file", str(secrets.tokens)))
    credentials = grpc.ssl_channel_credentials(secrets.authority.pem)
    with run.server(options, credentials) as server:

        async def loop(number: int) -> None:
            while not is_over.is_set():
                async with grpc.aio.secure_channel(server.address, credentials, OWN_CONNECTION) as channel:
                    for _ in range(1 if number % 2 else 50):
                        begun[number] += 1
                        metadata = (("authorization", f"Bearer {secrets.token}"),)
                        await run.call(stub_of(channel).Generate(REQUEST, metadata=metadata))

        async def wait_for_new_calls() -> None:
            before = list(begun)
            while any(now <= then for now, then in zip(begun, before, strict=True)):  # noqa: ASYNC110 - counters
                await asyncio.sleep(0.01)

        loops = [asyncio.ensure_future(loop(number)) for number in range(LOOPS)]
        for _ in range(run.size(10)):
            secrets.replace_certificate()
            secrets.add_token()
            await wait_for_new_calls()
            secrets.remove_old_token()
            await wait_for_new_calls()
        is_over.set()
        await asyncio.gather(*loops)
    run.must_end(FINISHED)


async def drain(run: Run) -> None:
    """The server is stopped under the load of 64 loops: calls finish or get UNAVAILABLE, and it exits with 0."""
    number = run.size(64)
    options = Options(tokens=3, token_seconds=0.02, limit=1000, lame_duck_seconds=2)
    with run.server(options) as server:

        async def loop() -> None:
            async with connect(server) as channel:
                ends = set[str]()
                while ends <= {FINISHED}:
                    ends.add(await run.call(read_all(stub_of(channel).GenerateStream(REQUEST))))

        loops = [asyncio.ensure_future(loop()) for _ in range(number)]
        while run.outcomes[FINISHED] < 3 * number:  # noqa: ASYNC110 - a counter has no event
            await asyncio.sleep(0.01)
        server.process.terminate()
        status = await asyncio.to_thread(server.process.wait)
        await asyncio.gather(*loops)
    run.must(status == 0, f"the server stops with status 0, not {status}")
    run.must_end(FINISHED, "UNAVAILABLE")
    run.must(run.outcomes["UNAVAILABLE"] == number, "each loop ends with one refused call")
