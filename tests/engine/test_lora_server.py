"""LoRA adapters, loaded out of a folder and named by requests, on the real engine behind the real server."""

import asyncio

import grpc
import pytest
from engine.conftest import ADAPTERS, Served

from yuan_grpc.v1 import yuan_pb2 as pb

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "世界上最高的山是什么"


async def load(served: Served, name: str) -> None:
    await served.stub.LoadLora(pb.LoadLoraRequest(name=name))


async def refusal(served: Served, name: str) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await load(served, name)
    return raised.value.code(), raised.value.details() or ""


async def ids(served: Served, model: str = "") -> list[int]:
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=30, top_k=1, ignore_eos=True, model=model)
    response = await served.generate(request)
    assert response.model == (model or "yuan-demo")
    return list(response.choices[0].token_ids)


async def test_an_adapter_answers_by_its_name_and_changes_no_one_else(served: Served) -> None:
    plain = await ids(served)
    await load(served, "poems")
    await load(served, "code")
    poems, code = await ids(served, "poems"), await ids(served, "code")
    assert len({tuple(plain), tuple(poems), tuple(code)}) == 3
    together = await asyncio.gather(*[ids(served, model) for model in ("", "poems", "code") * 4])
    assert together == [plain, poems, code] * 4


async def test_adapters_are_listed_loaded_and_available(served: Served) -> None:
    await load(served, "poems")
    listed = await served.stub.ListLoras(pb.ListLorasRequest())
    assert [lora.name for lora in listed.loras] == ["poems"]
    assert list(listed.available) == sorted({*ADAPTERS, "broken"} - {"poems"})
    model = await served.stub.GetModel(pb.GetModelRequest())
    assert list(model.lora.loaded) == ["poems"]


async def test_an_adapter_that_is_not_loaded_is_not_found(served: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await ids(served, "poems")
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("nothing", grpc.StatusCode.NOT_FOUND),
        ("", grpc.StatusCode.INVALID_ARGUMENT),
        ("../adapters/poems", grpc.StatusCode.INVALID_ARGUMENT),
        ("..", grpc.StatusCode.INVALID_ARGUMENT),
        ("世" * 200, grpc.StatusCode.INVALID_ARGUMENT),
        ("broken", grpc.StatusCode.INVALID_ARGUMENT),
        ("yuan-demo", grpc.StatusCode.ALREADY_EXISTS),
    ],
    ids=["not there", "no name", "a path", "the parent", "a long name", "of another model", "the model"],
)
async def test_what_cannot_be_loaded_is_refused_and_harms_nobody(
    served: Served, name: str, code: grpc.StatusCode
) -> None:
    before = await ids(served)
    said, details = await refusal(served, name)
    assert said is code
    assert str(served.lora_folder) not in details
    assert await ids(served) == before


async def test_there_is_room_for_so_many(served: Served) -> None:
    await load(served, "poems")
    assert (await refusal(served, "poems"))[0] is grpc.StatusCode.ALREADY_EXISTS
    await load(served, "code")
    assert (await refusal(served, "stories"))[0] is grpc.StatusCode.FAILED_PRECONDITION
    await served.stub.UnloadLora(pb.UnloadLoraRequest(name="poems"))
    await load(served, "stories")
    assert await ids(served, "stories")


async def test_an_unloaded_adapter_stays_with_those_that_run_with_it(served: Served) -> None:
    await load(served, "poems")
    expected = await ids(served, "poems")
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=30, top_k=1, ignore_eos=True, model="poems")
    parts = aiter(served.stub.GenerateStream(request))
    await anext(parts)
    await served.stub.UnloadLora(pb.UnloadLoraRequest(name="poems"))
    tokens = [token_id async for part in parts for choice in part.choices for token_id in choice.token_ids]
    assert tokens == expected


async def test_who_names_an_adapter_that_is_being_loaded_does_not_find_it(served: Served) -> None:
    async def asked(model: str) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await ids(served, model)
        return raised.value.code()

    before = await ids(served)
    results = await asyncio.gather(refusal(served, "broken"), *[asked("broken") for _ in range(6)])
    assert {result for result in results if isinstance(result, grpc.StatusCode)} == {grpc.StatusCode.NOT_FOUND}
    assert await ids(served) == before
    await load(served, "poems")
    await load(served, "code")  # for which there is room again


async def test_a_beam_search_keeps_its_adapter(served: Served) -> None:
    await load(served, "poems")
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=20, use_beam_search=True, best_of=3, model="poems")
    expected = await served.generate(request)
    parts = aiter(served.stub.GenerateStream(request))
    await anext(parts)
    await served.stub.UnloadLora(pb.UnloadLoraRequest(name="poems"))
    await load(served, "code")
    *_, end = [part async for part in parts]
    assert end.choices == expected.choices


async def test_new_files_under_an_old_name_are_what_is_loaded(served: Served) -> None:
    folder = served.lora_folder / "poems" / "adapter_model.safetensors"
    other = served.lora_folder / "code" / "adapter_model.safetensors"
    before = folder.read_bytes()
    await load(served, "poems")
    old = await ids(served, "poems")
    await served.stub.UnloadLora(pb.UnloadLoraRequest(name="poems"))
    try:
        folder.write_bytes(other.read_bytes())
        await load(served, "poems")
        assert await ids(served, "poems") != old
    finally:
        folder.write_bytes(before)
