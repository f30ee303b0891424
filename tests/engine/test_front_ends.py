"""Several front ends of two data-parallel engines, started by `yuan-grpc serve --frontends`."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import psutil
import pytest
from adapters import write_adapter
from one_thread import ONE_THREAD
from ports import free_ports, processes_on
from safetensors.torch import load_file
from server_process import ServerProcess

from yuan_grpc.server.settings import DEMO
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1.yuan_pb2_grpc import YuanServiceStub

pytestmark = pytest.mark.engine

QUEUE_LIMIT = 6
ENDLESS = pb.GenerateRequest(prompt="世界上最高的山是什么", max_tokens=2000, ignore_eos=True)
LONG = pb.GenerateRequest(prompt="世界上最高的山是什么", max_tokens=300, ignore_eos=True)
LONGER = pb.GenerateRequest(prompt="世界上最高的山是什么", max_tokens=600, ignore_eos=True)
SHORT = pb.GenerateRequest(prompt="世界上最高的山是什么", max_tokens=4, temperature=0)


@pytest.fixture(scope="module")
def ports() -> int:
    """The port of the first front end; that of the second is the next one."""
    return free_ports()


@pytest.fixture(scope="module")
def unix_socket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unix socket of the first front end; that of the second has a number."""
    return tmp_path_factory.mktemp("socket") / "yuan"


@pytest.fixture(scope="module")
def started() -> Iterator[list[ServerProcess]]:
    """The servers that have been started, of which only the last one can be running."""
    servers: list[ServerProcess] = []
    yield servers
    for server in servers:
        server.kill()


@pytest.fixture
def server(
    started: list[ServerProcess], ports: int, unix_socket: Path, tmp_path_factory: pytest.TempPathFactory
) -> ServerProcess:
    """A server with two front ends and two engines of one adapter each; started again if a test has ended it."""
    if not started or started[-1].process.poll() is not None:
        loras = tmp_path_factory.mktemp("loras")
        write_adapter(loras / "style", load_file(Path(DEMO, "model.safetensors")), ["v_proj"])
        started.append(
            ServerProcess(
                *("--frontends", "2", "--frontend-ports", str(ports), "--http-port", "0"),
                *("--data-parallel-size", "2", "--max-num-queued-reqs", str(QUEUE_LIMIT)),
                *("--enable-lora", "--lora-folder", str(loras), "--unix-socket", str(unix_socket)),
                **ONE_THREAD,  # for each engine
            )
        )
        started[-1].wait_until_serving()
    return started[-1]


@pytest.fixture
def stubs(server: ServerProcess, ports: int) -> Iterator[list[YuanServiceStub]]:
    """A stub for each front end, as a client that retries while it is being replaced."""
    with ExitStack() as stack:
        channels = [stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{ports + number}")) for number in range(2)]
        for channel in channels:
            grpc.channel_ready_future(channel).result(timeout=60)
        yield [YuanServiceStub(channel) for channel in channels]


def test_all_front_ends_listen_on_one_port_and_give_equal_answers(
    server: ServerProcess, stubs: list[YuanServiceStub], ports: int, unix_socket: Path
) -> None:
    processes = {process.pid for number in range(2) for process in processes_on(ports + number)}
    assert {process.pid for process in processes_on(int(server.address.rpartition(":")[2]))} == processes
    assert len(processes) == 2
    assert len({stub.Generate(SHORT).choices[0].text for stub in (server.stub, *stubs)}) == 1
    for path in (unix_socket, unix_socket.with_name(f"{unix_socket.name}.1")):
        with grpc.insecure_channel(f"unix:{path}") as channel:
            assert YuanServiceStub(channel).Generate(SHORT).usage.completion_tokens == 4


def test_all_processes_are_forks_of_one_and_have_names(server: ServerProcess) -> None:
    processes = psutil.Process(server.process.pid).children(recursive=True)
    parents = {" ".join(each.cmdline()).strip(): each.ppid() for each in processes}
    names = {"DPCoordinator", "EngineCore_DP0", "EngineCore_DP1", "front-end-0", "front-end-1"}
    (fork_server,) = (each.pid for each in processes if "VLLM::ForkServer" in each.cmdline())
    assert {name: parents.get(f"VLLM::{name}") for name in names} == dict.fromkeys(names, fork_server)


def runs_on_both_engines(stub: YuanServiceStub) -> bool:
    """Return whether requests that are sent together run on both engines."""
    calls = [stub.GenerateStream(ENDLESS) for _ in range(QUEUE_LIMIT // 2)]  # earlier ones may not be freed yet
    try:
        for _ in range(100):  # an engine reports its load after a step
            for call in calls:
                next(call)
            loads = stub.GetLoads(pb.GetLoadsRequest()).loads
            assert [load.dp_rank for load in loads] == [0, 1]
            if all(load.num_running_reqs for load in loads):
                return True
        return False
    finally:
        for call in calls:
            call.cancel()


def test_both_engines_run_requests_of_each_front_end(stubs: list[YuanServiceStub]) -> None:
    for stub in stubs:  # it may still count the requests of the other one that have been cancelled
        assert any(runs_on_both_engines(stub) for _ in range(10))


def test_a_call_is_aborted_through_another_front_end(stubs: list[YuanServiceStub]) -> None:
    call = stubs[0].GenerateStream(ENDLESS)
    request_id = next(call).request_id
    stubs[1].Abort(pb.AbortRequest(request_id=request_id))
    with pytest.raises(grpc.RpcError) as raised:
        list(call)
    assert raised.value.code() is grpc.StatusCode.CANCELLED
    with pytest.raises(grpc.RpcError) as raised:
        stubs[1].Abort(pb.AbortRequest(request_id=request_id))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_an_adapter_is_loaded_and_unloaded_on_all_front_ends(stubs: list[YuanServiceStub]) -> None:
    plain = stubs[1].Generate(SHORT)
    stubs[0].LoadLora(pb.LoadLoraRequest(name="style"))
    assert [lora.name for lora in stubs[1].ListLoras(pb.ListLorasRequest()).loras] == ["style"]
    with pytest.raises(grpc.RpcError) as raised:
        stubs[1].LoadLora(pb.LoadLoraRequest(name="style"))
    assert raised.value.code() is grpc.StatusCode.ALREADY_EXISTS
    request = pb.GenerateRequest(prompt=LONG.prompt, max_tokens=300, ignore_eos=True, model="style")
    call = stubs[1].GenerateStream(request)
    next(call)
    stubs[0].UnloadLora(pb.UnloadLoraRequest(name="style"))
    with pytest.raises(grpc.RpcError) as raised:
        stubs[1].Generate(request)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError) as raised:  # the running request keeps the only adapter in memory
        stubs[0].LoadLora(pb.LoadLoraRequest(name="style"))
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert list(call)[-1].usage.completion_tokens == 300
    stubs[0].LoadLora(pb.LoadLoraRequest(name="style"))
    stubs[1].UnloadLora(pb.UnloadLoraRequest(name="style"))
    assert stubs[1].Generate(SHORT).choices[0].text == plain.choices[0].text


def test_the_limit_on_requests_holds_for_all_front_ends_together(stubs: list[YuanServiceStub]) -> None:
    calls = [stubs[number % 2].GenerateStream(LONGER) for number in range(QUEUE_LIMIT)]
    for call in calls:
        next(call)
    for stub in stubs:
        with pytest.raises(grpc.RpcError) as raised:
            stub.Generate(SHORT)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert [list(call)[-1].usage.completion_tokens for call in calls] == [LONGER.max_tokens] * QUEUE_LIMIT


def test_a_front_end_that_dies_is_replaced_and_its_requests_are_freed(
    server: ServerProcess, stubs: list[YuanServiceStub], ports: int
) -> None:
    (killed,) = processes_on(ports)
    stubs[1].LoadLora(pb.LoadLoraRequest(name="style"))
    lost = [stubs[0].GenerateStream(ENDLESS) for _ in range(QUEUE_LIMIT - 1)]
    kept = stubs[1].GenerateStream(LONG)
    for call in (*lost, kept):
        next(call)
    killed.kill()
    for call in lost:
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert list(kept)[-1].usage.completion_tokens == 300
    answer = stubs[0].Generate(SHORT, wait_for_ready=True)  # of the replacement
    assert answer.choices[0].text == stubs[1].Generate(SHORT).choices[0].text
    (replacement,) = processes_on(ports)
    assert replacement.pid != killed.pid
    adapted = pb.GenerateRequest(prompt=SHORT.prompt, max_tokens=4, ignore_eos=True, model="style")
    assert stubs[0].Generate(adapted).usage.completion_tokens == 4
    stubs[1].UnloadLora(pb.UnloadLoraRequest(name="style"))
    with ThreadPoolExecutor(QUEUE_LIMIT) as pool:  # the queue is empty: the lost requests do not count any more
        calls = [pool.submit(stubs[1].Generate, SHORT) for _ in range(QUEUE_LIMIT)]
        assert {call.result().usage.completion_tokens for call in calls} == {4}


def test_a_stop_finishes_the_calls_of_all_front_ends_and_leaves_no_process(
    server: ServerProcess, stubs: list[YuanServiceStub]
) -> None:
    calls = [stub.GenerateStream(LONG) for stub in stubs]
    for call in calls:
        next(call)
    processes = server.engine_processes()
    os.killpg(server.process.pid, signal.SIGTERM)
    assert [list(call)[-1].usage.completion_tokens for call in calls] == [300, 300]
    status, log = server.wait_for_exit()
    assert status == 0, log
    assert "Traceback" not in log
    assert not psutil.wait_procs(processes, timeout=10)[1]


def test_a_dead_engine_ends_the_calls_of_all_front_ends_and_the_server(
    server: ServerProcess, stubs: list[YuanServiceStub], ports: int
) -> None:
    calls = [stub.GenerateStream(ENDLESS) for stub in stubs]
    for call in calls:
        next(call)
    processes = server.engine_processes()
    front_ends = [process for number in range(2) for process in processes_on(ports + number)]
    for process in processes:  # the engine and its worker
        if process not in front_ends and process.ppid() == front_ends[0].ppid():
            process.kill()
    for call in calls:
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    status, log = server.wait_for_exit()
    assert status == 1
    assert "ERROR the engine was lost" in log
    assert not psutil.wait_procs(processes, timeout=10)[1]
