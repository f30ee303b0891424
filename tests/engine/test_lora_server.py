"""LoRA adapters, loaded from a folder and selected by requests, on a real server with a real engine."""

import asyncio
from pathlib import Path
from shutil import copytree, rmtree

import grpc
import pytest
from engine.conftest import ADAPTERS, Served

from yuan_grpc.v1 import yuan_pb2 as pb

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

PROMPT = "世界上最高的山是什么"


async def load(served: Served, name: str) -> None:
    await served.stub.LoadLora(pb.LoadLoraRequest(name=name))


async def load_error(served: Served, name: str) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await load(served, name)
    return raised.value.code(), raised.value.details() or ""


async def generated_ids(served: Served, model: str = "") -> list[int]:
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=30, top_k=1, ignore_eos=True, model=model)
    response = await served.generate(request)
    assert response.model == (model or "yuan-demo")
    return list(response.choices[0].token_ids)


async def test_an_adapter_is_selected_by_name_and_does_not_affect_other_requests(served: Served) -> None:
    plain = await generated_ids(served)
    await load(served, "poems")
    await load(served, "code")
    poems, code = await generated_ids(served, "poems"), await generated_ids(served, "code")
    assert len({tuple(plain), tuple(poems), tuple(code)}) == 3
    concurrent = await asyncio.gather(*[generated_ids(served, model) for model in ("", "poems", "code") * 4])
    assert concurrent == [plain, poems, code] * 4


async def test_loaded_and_available_adapters_are_listed(served: Served) -> None:
    await load(served, "poems")
    listed = await served.stub.ListLoras(pb.ListLorasRequest())
    assert [lora.name for lora in listed.loras] == ["poems"]
    assert list(listed.available) == sorted({*ADAPTERS, "broken"} - {"poems"})
    model = await served.stub.GetModel(pb.GetModelRequest())
    assert list(model.lora.loaded) == ["poems"]


async def test_an_adapter_that_is_not_loaded_is_not_found(served: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await generated_ids(served, "poems")
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


async def test_an_adapter_outside_the_folder_is_not_found(served: Served, tmp_path: Path) -> None:
    copytree(served.lora_folder / "poems", tmp_path / "poems")
    linked, with_link = served.lora_folder / "linked", served.lora_folder / "with link"
    inside = served.lora_folder / "alias"
    try:
        linked.symlink_to(tmp_path / "poems")
        copytree(served.lora_folder / "poems", with_link)
        (with_link / "adapter_model.safetensors").unlink()
        (with_link / "adapter_model.safetensors").symlink_to(tmp_path / "poems" / "adapter_model.safetensors")
        inside.symlink_to(served.lora_folder / "poems")
        available = (await served.stub.ListLoras(pb.ListLorasRequest())).available
        assert {"alias", "poems"} <= set(available)
        assert not {"linked", "with link"} & set(available)
        for name in ("linked", "with link"):
            assert (await load_error(served, name))[0] is grpc.StatusCode.NOT_FOUND
        await load(served, "alias")
    finally:
        rmtree(with_link, ignore_errors=True)
        for link in (linked, inside):
            link.unlink(missing_ok=True)


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
    ids=["missing", "empty", "path", "parent folder", "long name", "for another model", "served model"],
)
async def test_an_adapter_that_cannot_be_loaded_is_rejected_without_side_effects(
    served: Served, name: str, code: grpc.StatusCode
) -> None:
    before = await generated_ids(served)
    raised, details = await load_error(served, name)
    assert raised is code
    assert str(served.lora_folder) not in details
    assert await generated_ids(served) == before


async def test_the_number_of_loaded_adapters_is_limited(served: Served) -> None:
    await load(served, "poems")
    assert (await load_error(served, "poems"))[0] is grpc.StatusCode.ALREADY_EXISTS
    await load(served, "code")
    assert (await load_error(served, "stories"))[0] is grpc.StatusCode.FAILED_PRECONDITION
    await served.stub.UnloadLora(pb.UnloadLoraRequest(name="poems"))
    await load(served, "stories")
    assert await generated_ids(served, "stories")


async def test_running_requests_keep_an_unloaded_adapter(served: Served) -> None:
    await load(served, "poems")
    expected = await generated_ids(served, "poems")
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=30, top_k=1, ignore_eos=True, model="poems")
    messages = aiter(served.stub.GenerateStream(request))
    await anext(messages)
    await served.stub.UnloadLora(pb.UnloadLoraRequest(name="poems"))
    tokens = [token_id async for message in messages for choice in message.choices for token_id in choice.token_ids]
    assert tokens == expected


async def test_an_adapter_cannot_be_selected_while_it_is_loading(served: Served) -> None:
    async def status_with(model: str) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await generated_ids(served, model)
        return raised.value.code()

    before = await generated_ids(served)
    results = await asyncio.gather(load_error(served, "broken"), *[status_with("broken") for _ in range(6)])
    assert {result for result in results if isinstance(result, grpc.StatusCode)} == {grpc.StatusCode.NOT_FOUND}
    assert await generated_ids(served) == before
    await load(served, "poems")
    await load(served, "code")  # the failed load has freed its memory


async def test_a_beam_search_keeps_its_unloaded_adapter(served: Served) -> None:
    await load(served, "poems")
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=20, use_beam_search=True, best_of=3, model="poems")
    expected = await served.generate(request)
    messages = aiter(served.stub.GenerateStream(request))
    await anext(messages)
    await served.stub.UnloadLora(pb.UnloadLoraRequest(name="poems"))
    await load(served, "code")
    *_, end = [message async for message in messages]
    assert end.choices == expected.choices


async def test_new_files_under_an_old_name_are_loaded(served: Served) -> None:
    file = served.lora_folder / "poems" / "adapter_model.safetensors"
    other = served.lora_folder / "code" / "adapter_model.safetensors"
    before = file.read_bytes()
    await load(served, "poems")
    old = await generated_ids(served, "poems")
    await served.stub.UnloadLora(pb.UnloadLoraRequest(name="poems"))
    try:
        file.write_bytes(other.read_bytes())
        await load(served, "poems")
        assert await generated_ids(served, "poems") != old
    finally:
        file.write_bytes(before)
