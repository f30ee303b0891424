"""The check of what the package replaces in vLLM."""

from importlib.metadata import version

import pytest

from yuan_grpc.vllm_check import NO_FUNCTION, UnsupportedVllmError, check_vllm, vllm_imports_checked


@pytest.mark.parametrize(
    ("symbol", "parameters"),
    [
        ("json:JSONDecoder.decode", "self, s, _w"),
        ("json:JSONDecoder.decode", "self, ..."),
        ("json:JSONDecoder.decode", "self, s, _w, ..."),
        ("json.decoder:JSONDecodeError.__reduce__", "self"),
        ("tempfile:gettempdir", ""),
        ("json.decoder:NaN", NO_FUNCTION),
    ],
)
def test_a_function_with_the_expected_parameters_is_accepted(symbol: str, parameters: str) -> None:
    check_vllm(__name__, {symbol: parameters})


@pytest.mark.parametrize(
    ("symbol", "parameters", "message"),
    [
        ("json:JSONDecoder.decode", "self, s", r"must take \(self, s\), not self, s, _w, for test_vllm_check;"),
        ("json:JSONDecoder.decode", "self, text, ...", r"must take \(self, text, \.\.\.\), not self, s, _w, for"),
        ("json:JSONDecoder.decode", "self, s, _w, more, ...", r"must take .* not self, s, _w, for"),
        ("json:JSONDecoder.missing", "self", r"must take \(self\), not missing, for"),
        ("json.missing:decode", NO_FUNCTION, "must exist, not missing, for"),
        ("json.decoder:NaN", "self", r"must take \(self\), not something without parameters, for"),
    ],
)
def test_another_function_is_an_error_that_names_it_and_what_to_do(symbol: str, parameters: str, message: str) -> None:
    with pytest.raises(UnsupportedVllmError, match=f"`{symbol}` {message}") as raised:
        check_vllm(__name__, {symbol: parameters})
    text = str(raised.value)
    assert text.startswith("vLLM ")
    assert f"not supported by yuan-grpc {version('yuan-grpc')}: " in text
    assert text.endswith("set VLLM_PLUGINS= to run other models without Yuan")
    assert "\n" not in text


def test_an_import_that_vllm_lacks_names_the_version() -> None:
    message = r"is not supported by yuan-grpc .*No module named 'vllm\.gone'"
    with pytest.raises(UnsupportedVllmError, match=message), vllm_imports_checked():
        raise ModuleNotFoundError("No module named 'vllm.gone'", name="vllm.gone")


@pytest.mark.parametrize("name", ["vllm", "torch", None])
def test_other_missing_packages_are_reported_as_before(name: str | None) -> None:
    with pytest.raises(ModuleNotFoundError, match="absent"), vllm_imports_checked():
        raise ModuleNotFoundError("absent", name=name)


def test_an_attribute_that_vllm_lacks_names_the_version() -> None:
    class Registry:
        __module__ = "vllm.registry"

    with pytest.raises(UnsupportedVllmError, match="has no attribute 'gone'"), vllm_imports_checked():
        Registry.gone  # type: ignore[attr-defined]  # noqa: B018


def test_other_faults_are_not_vllms() -> None:
    with pytest.raises(AttributeError, match="gone"), vllm_imports_checked():
        object().gone  # type: ignore[attr-defined]  # noqa: B018
