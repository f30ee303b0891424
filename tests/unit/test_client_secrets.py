"""Secrets of the client: which targets are local, which metadata is secret, and that no text shows a value."""

import ipaddress
import traceback
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from yuan_grpc.client import AsyncClient, Client
from yuan_grpc.client.base import PreparedCall
from yuan_grpc.client.channel import Settings
from yuan_grpc.client.metadata import is_secret
from yuan_grpc.client.target import is_local, is_valid

SECRET = "hunter2"

LOCAL_TARGETS = [
    "localhost:1",
    "LOCALHOST:1",
    "127.0.0.1:1",
    "127.9.9.9:1",
    "[::1]:1",
    "[::ffff:127.0.0.1]:1",
    "dns:localhost:1",
    "dns:localhost",
    "dns:///localhost:1",
    "dns:///127.0.0.1:1",
    "dns:///[::1]:1",
    "ipv4:127.0.0.1:1",
    "ipv4:127.0.0.1:1,127.0.0.2:2",
    "ipv4:///127.0.0.1:1",
    "ipv6:[::1]:1",
    "ipv6:[::1]:1,[::1]:2",
    "unix:socket",
    "unix:/run/a",
    "unix:///run/a",
    "unix-abstract:name",
]

REMOTE_TARGETS = [
    "host:1",
    "10.0.0.1:1",
    "0.0.0.0:1",
    "127.1:1",
    "2130706433:1",
    "0x7f000001:1",
    "localhost.evil:1",
    "evil.localhost:1",
    "localhost.:1",
    "user@localhost:1",
    "127.0.0.1.evil:1",
    "[::]:1",
    "[::ffff:10.0.0.1]:1",
    "[::ffff:0.0.0.0]:1",
    "[fe80::1%eth0]:1",
    "[::1%eth0]:1",
    "dns://10.0.0.1/localhost:1",
    "dns://evil/127.0.0.1:1",
    "dns://localhost:1/evil:1",
    "dns:evil/localhost:1",
    "dns:////localhost:1",
    "dns:///evil:1?/localhost:1",
    "dns:///evil:1#/localhost:1",
    "dns:///evil:1/localhost:1",
    "dns:///localhost:1@evil:1",
    "dns:///localhost:1,evil:1",
    "dns:///localhost%2eevil:1",
    "dns:///localhost:1\n",
    "dns:///",
    "dns:",
    "ipv4:127.0.0.1:1,10.0.0.1:2",
    "ipv4:127.0.0.1:1,",
    "ipv4:127.0.0.1%2C10.0.0.1:1",
    "ipv4://evil/127.0.0.1:1",
    "ipv6:[::1]:1,[fe80::1]:1",
    "ipv6:::1",
    "unix://evil/run/a",
    "unix-abstract://evil/a",
    "vsock:1:1",
    "xds:///localhost:1",
    "http://localhost:1",
    "DNS:///localhost:1",
    "UNIX:/run/a",
    "passthrough:///localhost:1",
]


@pytest.mark.parametrize("target", LOCAL_TARGETS)
def test_a_secret_may_go_to_this_machine_in_plaintext(target: str) -> None:
    assert is_local(target)
    Settings(target, token=SECRET, metadata={"x-api-key": SECRET})


@pytest.mark.parametrize("target", REMOTE_TARGETS)
def test_a_secret_never_goes_to_another_machine_in_plaintext(target: str) -> None:
    assert not is_local(target)
    for arguments in ({"token": SECRET}, {"metadata": {"x-api-key": SECRET}}):
        with pytest.raises(ValueError, match=r"needs `tls`|`target` must be"):
            Settings(target, **arguments)


@given(st.ip_addresses(v=4))
def test_an_address_is_local_only_if_it_is_a_loopback_address(address: ipaddress.IPv4Address) -> None:
    assert is_local(f"{address}:1") == is_local(f"[::ffff:{address}]:1") == address.is_loopback


PARTS = ["dns:", "ipv4:", "ipv6:", "///", "//", "/", "localhost", "127.0.0.1", "[::1]", ":1", ",", "evil", *"@?#%.:"]


@given(st.lists(st.sampled_from(PARTS), max_size=8).map("".join))
@example("dns:///localhost:1")
def test_a_local_target_has_no_part_that_names_another_host(target: str) -> None:
    if is_valid(target) and is_local(target):
        assert "evil" not in target
        assert not set(target) & set("@?#%")


@pytest.mark.parametrize(
    "options",
    [
        [("grpc.http_proxy", "http://proxy:1")],
        [("grpc.enable_http_proxy", 1)],
        [("grpc.address_http_proxy", "proxy:1"), ("grpc.address_http_proxy_enabled_addresses", "127.0.0.0/8")],
    ],
)
def test_a_secret_never_goes_through_a_proxy_of_the_options(options: Any) -> None:
    with pytest.raises(ValueError, match="never through a proxy"):
        Client("127.0.0.1:1", token=SECRET, options=options)


@pytest.mark.parametrize(
    "key",
    [
        *("authorization", "proxy-authorization", "cookie", "x-api-key", "api_key", "apikey", "x-goog-api-key", "key"),
        *("x-auth-token", "token", "x-amz-security-token", "client-secret", "x-secret-bin", "db.password", "session"),
        *("x-credentials", "credential"),
    ],
)
def test_metadata_whose_last_word_names_a_secret_needs_tls(key: str) -> None:
    assert is_secret(key)
    message = f"`{key}` in `metadata` needs `tls`"
    for metadata in ({key.upper(): SECRET}, [(key, SECRET)]):
        with pytest.raises(ValueError, match=message):
            Client("host:1", metadata=metadata)
    Client("host:1", metadata={key: SECRET}, tls=True).close()
    Client("localhost:1", metadata={key: SECRET}).close()
    with Client("host:1") as client, pytest.raises(ValueError, match=message):
        client.generate("a", metadata={key: SECRET})


@pytest.mark.parametrize(
    "key", ["x-team", "traceparent", "x-tokens-used", "monkey", "x-key-count", "baggage", "x-request-id", "turkey"]
)
def test_other_metadata_needs_no_tls(key: str) -> None:
    assert not is_secret(key)
    Client("host:1", metadata={key: "a"}).close()


def test_no_repr_has_a_secret() -> None:
    settings = Settings(
        "localhost:1",
        tls=True,
        client_cert=(SECRET, SECRET.encode()),
        token=SECRET,
        proxy=f"http://user:{SECRET}@proxy:1",
        metadata={"x-api-key": SECRET},
        options=[("grpc.http_proxy", SECRET)],
    )
    call = PreparedCall("Generate", None, None, (("authorization", SECRET),))
    with Client(token=SECRET) as client:
        texts = [repr(settings), str(settings), repr(call), repr(client)]
    assert not any(SECRET in text for text in texts)
    assert "target='localhost:1'" in texts[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"token": f"{SECRET}\n"},
        {"token": f"{SECRET}é"},
        {"token": lambda: f"{SECRET}\r"},
        {"token": lambda: SECRET.encode()},
        {"metadata": {"x-api-key": f"{SECRET}\n"}},
        {"metadata": {"x-api-key": f"{SECRET}\n".encode()}},
        {"metadata": {"x-api-key": [SECRET]}},
        {"metadata": {"x api key": SECRET}},
        {"token": SECRET, "target": "host:1"},
        {"metadata": {"x-api-key": SECRET}, "target": "host:1"},
    ],
)
async def test_no_traceback_has_a_secret(arguments: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as sync_error, Client(**arguments) as client:
        client.generate("a", timeout=1)
    with pytest.raises((ValueError, TypeError)) as async_error:
        async with AsyncClient(**arguments) as async_client:
            await async_client.generate("a", timeout=1)
    for raised in (sync_error, async_error):
        assert SECRET not in str(raised.value)
        assert SECRET not in "".join(traceback.format_exception(raised.value))
