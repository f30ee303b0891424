"""The faults of vLLM that yuan_grpc.model.patches fixes.

Each test shows that vLLM without the patch still has the fault. When one fails after an upgrade of vLLM, the patch may
no longer be needed: see the head of its module. Other tests show that the patches work.
"""

import inspect
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from subprocess import PIPE
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from engine_process import run_program

from yuan_grpc.model import patches
from yuan_grpc.model.patches import (
    cpu_busy_wait,
    cpu_expert_map,
    cpu_lora_slots,
    cpu_seeds,
    cpu_spec_decode,
    grammar_timeout,
    logprob_token_ids,
    lora_classes,
    model_info,
    prompt_graphs,
    worker_death,
)
from yuan_grpc.model.tokenizer import YuanTokenizer
from yuan_grpc.server.engine.vllm.processes import ProcessTree
from yuan_grpc.vllm_check import NO_FUNCTION, UnsupportedVllmError, installed_version

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # vLLM's warnings while it is imported

SUPPORT = Path(__file__).parents[1] / "support"
UNPATCHED = os.environ | {
    "VLLM_PLUGINS": "",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}
"""Environment in which vLLM does not load the plugin, and logs when an engine begins to shut down."""
SLOW_REGEX = "((a{0,100}){0,100}){0,100}"
MASKS = 16
"""Tokens of the slow expression in a test: the time of a mask grows with the fourth power of their number."""

PATCHES = Path(patches.__file__).parent
REPLACE_NOTHING = {"__init__", "cpu_amx", "worker_process"}

slow_and_only_for_another_vllm = pytest.mark.skipif(
    "TEST_UNPATCHED_VLLM" not in os.environ,
    reason="starts processes of a vLLM without patches, and the pinned one does not change: `make vllm-next` runs it",
)
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the fault is in vLLM for CPUs")


@pytest.fixture
def kernels() -> None:
    """Loads vLLM's compiled operators for CPUs."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()


@on_a_cpu
@pytest.mark.parametrize("name", sorted({path.stem for path in PATCHES.glob("*.py")} - REPLACE_NOTHING))
def test_a_patch_is_not_applied_to_a_function_that_has_changed(name: str) -> None:
    patch = import_module(f"{patches.__name__}.{name}")
    assert patch.TARGETS
    for symbol, parameters in patch.TARGETS.items():
        owner, _, attribute = symbol.replace(":", ".").rpartition(".")
        with pytest.MonkeyPatch.context() as changed:
            if parameters == NO_FUNCTION:
                changed.delattr(resolve_name(owner), attribute)
            else:
                changed.setattr(resolve_name(owner), attribute, lambda other, parameters: None)
            message = f"^vLLM {re.escape(installed_version())} is not supported by .*: `{symbol}` must .* for {name};"
            with pytest.raises(UnsupportedVllmError, match=message):
                patch.apply()


@on_a_cpu
@slow_and_only_for_another_vllm
@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this CPU has no AMX")
def test_cpu_amx_vllm_does_not_request_the_tile_registers() -> None:
    program = [sys.executable, str(SUPPORT / "unpatched_attention.py")]
    for options, status in (([], -signal.SIGILL), (["--patched"], 0)):
        done = subprocess.run([*program, *options], env=UNPATCHED, capture_output=True, text=True)
        assert done.stdout.splitlines() == ["amx"], done.stderr
        assert done.returncode == status, done.stderr


@on_a_cpu
def test_cpu_busy_wait_vllm_polls_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed import utils
    from vllm.distributed.device_communicators import shm_broadcast

    calls: list[str] = []
    monkeypatch.setattr(shm_broadcast, "sched_yield", utils.sched_yield)
    monkeypatch.setattr(os, "sched_yield", lambda: calls.append("sched_yield"))
    monkeypatch.setattr(time, "sleep", lambda seconds: calls.append("sleep"))
    reader: Any = SimpleNamespace(is_reader=True, last_read=time.monotonic(), busy_loop_s=1000)
    shm_broadcast.SpinCondition.wait(reader)
    assert calls == ["sched_yield"]
    cpu_busy_wait.apply()
    shm_broadcast.SpinCondition.wait(reader)
    assert calls == ["sched_yield", "sleep"]


@on_a_cpu
def test_cpu_lora_slots_vllm_applies_the_last_adapter_to_requests_without_one() -> None:
    from vllm.lora import worker_manager
    from vllm.lora.ops.torch_ops import bgmv_expand

    output = torch.zeros(1, 2)
    bgmv_expand(torch.ones(1, 1), torch.ones(3, 1, 2, 1), output, torch.tensor([-1]), add_inputs=True)
    assert output.tolist() == [[1, 1]]
    cpu_lora_slots.apply()
    assert inspect.unwrap(worker_manager.create_lora_manager) is not worker_manager.create_lora_manager


@on_a_cpu
def test_cpu_expert_map_vllm_passes_the_ids_of_all_experts_to_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    passed: list[tuple[Any, Any]] = []
    monkeypatch.setattr(cpu_moe, "cpu_fused_moe", lambda *arguments: passed.append((arguments[7], arguments[6])))
    ids, weights = torch.tensor([[3, 0]], dtype=torch.int32), torch.tensor([[0.75, 0.25]])
    names = inspect.signature(inspect.unwrap(cpu_moe.CPUUnquantizedExperts.apply)).parameters
    arguments = dict.fromkeys(names) | {
        "self": SimpleNamespace(_use_zentorch=False, w1_bias=None, w2_bias=None, isa="vec"),
        "topk_ids": ids,
        "topk_weights": weights,
        "activation": SimpleNamespace(value="silu"),
        "expert_map": torch.tensor([-1, -1, 0, 1]),
    }
    inspect.unwrap(cpu_moe.CPUUnquantizedExperts.apply)(**arguments)
    cpu_expert_map.apply()
    cpu_expert_map.apply()
    cpu_moe.CPUUnquantizedExperts.apply(**arguments)
    assert [(ids.tolist(), weights.tolist()) for ids, weights in passed] == [
        ([[3, 0]], [[0.75, 0.25]]),
        ([[1, 0]], [[0.75, 0]]),
    ]


@on_a_cpu
def test_cpu_logprob_ranks_vllm_compiles_the_ranks_even_if_nothing_else_is_compiled() -> None:
    from vllm.v1.sample.ops import logprobs

    compiled = inspect.getsource(logprobs)
    assert "@torch.compile(backend=current_platform.simple_compile_backend)\ndef batched_count" in compiled


def test_model_info_vllm_inspects_the_class_in_another_process() -> None:
    from vllm.model_executor.models import registry

    assert "_run_in_subprocess(" in inspect.getsource(registry._LazyRegisteredModel.inspect_model_cls)


@pytest.mark.parametrize(
    ("module", "name", "elsewhere"),
    [
        ("yuan_grpc.model.yuan", "YuanForCausalLM", 0),
        ("vllm.model_executor.models.llama", "LlamaForCausalLM", 1),
    ],
)
def test_model_info_on_a_gpu_only_our_class_is_inspected_in_this_process(
    module: str, name: str, elsewhere: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vllm.model_executor.models import registry

    def in_subprocess(fn: Any) -> Any:
        calls.append(fn)
        return fn()

    calls: list[Any] = []
    monkeypatch.setattr(registry, "_run_in_subprocess", in_subprocess)
    monkeypatch.setattr(model_info, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    model_info.apply()
    info = registry._LazyRegisteredModel(module_name=module, class_name=name).inspect_model_cls()
    assert (info.architecture, len(calls)) == (name, elsewhere)


def test_worker_death_vllm_does_not_name_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.executor.multiproc_executor import UnreadyWorkerProcHandle, WorkerProc

    def killed_worker() -> Any:
        reader, writer = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=signal.raise_signal, args=(signal.SIGKILL,))
        process.start()
        writer.close()
        return UnreadyWorkerProcHandle(process, 0, reader)

    original = getattr(WorkerProc.wait_for_ready, "__wrapped__", WorkerProc.wait_for_ready)
    with pytest.raises(Exception, match=r"See stack trace for root cause\.$"):
        original([killed_worker()])
    monkeypatch.setattr(WorkerProc, "wait_for_ready", staticmethod(original))
    worker_death.apply()
    with pytest.raises(RuntimeError, match=r"^a worker was killed by SIGKILL$"):
        WorkerProc.wait_for_ready([killed_worker()])


@on_a_cpu
def test_cpu_seeds_vllm_rewinds_generators_that_have_no_offset() -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    requests = SimpleNamespace(num_reqs=1, generators={0: torch.Generator()})
    discarded = SimpleNamespace(np=torch.tensor([True]).numpy())
    runner: Any = SimpleNamespace(input_batch=requests, discard_request_mask=discarded)
    with pytest.raises(RuntimeError, match="does not use offset"):
        CPUModelRunner._bookkeeping_sync(runner, None, None, None, None, 0)
    cpu_seeds.apply()
    assert CPUModelRunner.sample_tokens.__wrapped__ is GPUModelRunner.sample_tokens


@on_a_cpu
def test_cpu_spec_decode_vllm_drops_the_expanded_parameters(kernels: None) -> None:
    from vllm.utils import cpu_triton_utils

    cpu_spec_decode.apply()
    patched = getattr(cpu_triton_utils, cpu_spec_decode.EXPAND_KERNEL)
    output = torch.full((2,), 99.0)
    inspect.unwrap(patched)(output, torch.tensor([0.7]), torch.tensor([2], dtype=torch.int32), 0, 1)
    assert output.tolist() == [99, 99]


@on_a_cpu
def test_cpu_spec_decode_vllm_cannot_apply_top_k_to_no_logits() -> None:
    from vllm.v1.sample.ops import topk_topp_sampler

    cpu_spec_decode.apply()
    logits, k = torch.empty(0, 8), torch.empty(0, dtype=torch.int32)
    with pytest.raises((RuntimeError, IndexError)):
        inspect.unwrap(topk_topp_sampler.apply_top_k_only)(logits, k.clone())
    assert topk_topp_sampler.apply_top_k_only(logits, k) is logits


def test_detokenizer_vllm_holds_back_the_replacement_character(demo: Path) -> None:
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    from yuan_grpc.model.patches import detokenizer

    detokenizer.apply()
    tokenizer = YuanTokenizer.from_pretrained(demo)
    token_ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "\ufffd".encode()])
    request = EngineCoreRequest(
        request_id="",
        prompt_token_ids=[0],
        mm_features=None,
        sampling_params=SamplingParams(),
        pooling_params=None,
        arrival_time=0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )

    def text(create: Any) -> Any:
        created = create(tokenizer, request)
        created.update(token_ids, False)
        return created.get_next_output_text(finished=True, delta=False)

    assert text(inspect.unwrap(IncrementalDetokenizer.from_new_request)) == ""
    assert text(IncrementalDetokenizer.from_new_request) == "\ufffd"


def test_grammar_timeout_vllm_accepts_tokens_of_a_constraint_that_takes_too_long(
    demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import xgrammar
    from vllm.v1.structured_output.backend_types import StructuredOutputOptions
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend, XgrammarGrammar

    grammar_timeout.apply()
    monkeypatch.setattr(grammar_timeout, "_slow_constraints", grammar_timeout._slow_constraints.copy())
    tokenizer = YuanTokenizer.from_pretrained(demo)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer))
    backend: Any = SimpleNamespace(
        compiler=xgrammar.GrammarCompiler(info),
        disable_any_whitespace=False,
        num_speculative_tokens=-1,
        vocab_size=len(tokenizer),
    )
    bitmask, token_ids = xgrammar.allocate_token_bitmask(1, len(tokenizer)), tokenizer.encode_word("a")[1]

    def masks_before_the_end(grammar: Any, fill_bitmask: Any, accept_tokens: Any) -> int:
        for masks in range(MASKS):
            fill_bitmask(grammar, bitmask, 0)
            if not accept_tokens(grammar, "request", token_ids):
                return masks
        return MASKS

    patched = (XgrammarGrammar.fill_bitmask, XgrammarGrammar.accept_tokens)
    compile_grammar = partial(XgrammarBackend.compile_grammar, backend, StructuredOutputOptions.REGEX, SLOW_REGEX)
    assert (
        masks_before_the_end(inspect.unwrap(compile_grammar.func)(*compile_grammar.args), *map(inspect.unwrap, patched))
        == MASKS
    )
    assert masks_before_the_end(compile_grammar(), *patched) < MASKS - 2
    with pytest.raises(ValueError, match="too long"):
        compile_grammar()


def test_grammar_timeout_vllm_parses_an_equal_constraint_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import xgrammar
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams
    from vllm.v1.structured_output import backend_xgrammar

    grammar_timeout.apply()
    monkeypatch.setattr(grammar_timeout, "_valid_constraints", OrderedDict())
    parsed: list[str] = []
    monkeypatch.setattr(xgrammar.Grammar, "from_regex", parsed.append)

    def validate(validate: Any, pattern: str) -> None:
        validate(SamplingParams(structured_outputs=StructuredOutputsParams(regex=pattern)))

    for pattern in ("a", "a", "b"):
        validate(backend_xgrammar.validate_xgrammar_grammar, pattern)
    assert parsed == ["a", "b"]
    for pattern in ("a", "a"):
        validate(inspect.unwrap(backend_xgrammar.validate_xgrammar_grammar), pattern)
    assert parsed == ["a", "b", "a", "a"]


def test_grammar_timeout_vllm_compiles_with_the_priority_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.structured_output import StructuredOutputManager

    def priority(manager: Any) -> int:
        number: int = manager.executor.submit(
            lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        ).result()
        return number

    grammar_timeout.apply()
    executor = ThreadPoolExecutor(1)
    monkeypatch.setattr(
        StructuredOutputManager,
        "__init__",
        grammar_timeout._with_low_priority(lambda manager: setattr(manager, "executor", executor)),
    )
    unpatched = priority(SimpleNamespace(executor=executor))
    assert priority(StructuredOutputManager()) == unpatched + grammar_timeout.NICE


@on_a_cpu
def test_loaded_blocks_vllm_computes_only_the_last_token_of_a_loaded_prompt(demo: Path, tmp_path: Path) -> None:
    """The state before it is in no block, at the end of a block as well as inside one."""
    engine = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_seqs": 2,
        "max_model_len": 128,
        "block_size": 32,
        "kv_cache_memory_bytes": 32 * 2**20,
        "kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"},
    }
    generator = random.Random(0)
    prompts = [[generator.randrange(1000) for _ in range(length)] for length in (64, 50)]
    job = {"model": demo, "engine": engine, "tokens": 4, "rounds": [prompts] * 2, "reset": True}
    unpatched = {"install": ["hand_over"], "unpatched": ["loaded_blocks"]}
    result = run_program("run_engine.py", job | unpatched, tmp_path / "out.json")
    for computed, loaded in zip(*result["rounds"], strict=True):
        assert abs(computed["logprobs"][0] - loaded["logprobs"][0]) > 0.01


def test_logprob_token_ids_vllm_drops_the_top_tokens_of_other_requests(
    kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler

    empty = torch.empty(0)
    metadata = SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=2,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=empty,
        presence_penalties=empty,
        repetition_penalties=empty,
        output_token_ids=[[], []],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
        logprob_token_ids={0: [5, 6]},
    )

    def top_tokens_of_the_other_request() -> list[int]:
        with torch.compiler.set_stance("force_eager"):
            tensors = Sampler()(torch.arange(16.0).view(2, 8), metadata).logprobs_tensors
        return list(tensors.logprob_token_ids[1].tolist())

    logprob_token_ids.apply()
    assert top_tokens_of_the_other_request() == [7, 7, 6]
    for method in ("forward", logprob_token_ids.GATHER):
        monkeypatch.setattr(Sampler, method, inspect.unwrap(getattr(Sampler, method)))
    assert top_tokens_of_the_other_request() == [7, 0, 0]


def test_lora_classes_vllm_has_no_registration_of_lora_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora import utils
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.v1.worker import lora_model_runner_mixin

    from yuan_grpc.model.lora import LORA_LAYERS, YuanAdapterManager

    monkeypatch.setattr(utils, "_all_lora_classes", utils._all_lora_classes)
    original = LRUCacheWorkerLoRAManager  # an earlier test may have replaced it
    monkeypatch.setattr(lora_model_runner_mixin, original.__name__, original)
    assert "for lora_cls in _all_lora_classes:" in inspect.getsource(utils.from_layer)
    load_lora_model = inspect.getsource(lora_model_runner_mixin.LoRAModelRunnerMixin.load_lora_model)
    assert "self.lora_manager = LRUCacheWorkerLoRAManager(" in load_lora_model
    lora_classes.apply()
    assert utils._all_lora_classes[: len(LORA_LAYERS)] == LORA_LAYERS
    assert lora_model_runner_mixin.LRUCacheWorkerLoRAManager is YuanAdapterManager


@on_a_cpu
@pytest.mark.parametrize("unpatched", [[], ["priority_preemption"]], ids=["patched", "unpatched"])
def test_priority_preemption_vllm_resumes_a_request_on_blocks_that_nothing_has_computed(
    demo: Path, tmp_path: Path, unpatched: list[str]
) -> None:
    """The last chunk of the long prompt and a block of the last request need the last free blocks in the same step."""
    engine = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_seqs": 4,
        "max_model_len": 640,
        "max_num_batched_tokens": 640,
        "block_size": 32,
        "kv_cache_memory_bytes": 32 * 2**20,
        "num_gpu_blocks_override": 22,
        "scheduling_policy": "priority",
        "long_prefill_token_threshold": 96,
    }
    generator = random.Random(0)
    prompts = [[generator.randrange(1000) for _ in range(length)] for length in (3, 18 * 32, 61)]
    job: dict[str, Any] = {"model": demo, "engine": engine, "tokens": 12, "unpatched": unpatched}
    result = run_program("run_engine.py", job | {"rounds": [prompts], "priorities": [0, 1, 0]}, tmp_path / "out.json")
    assert result["preemptions"] > 0
    ((_, preempted, _),) = result["rounds"]
    ((alone,),) = run_program("run_engine.py", job | {"rounds": [[prompts[1]]]}, tmp_path / "alone.json")["rounds"]
    difference = max(abs(a - b) for a, b in zip(preempted["logprobs"], alone["logprobs"], strict=True))
    assert (difference > 0.01) == bool(unpatched)


@dataclass
class UnpatchedEngine:
    """An engine process without the plugin, and the process that started it."""

    server: subprocess.Popen[str]
    process: psutil.Process
    group: int


@pytest.fixture
def unpatched_engine(tmp_path: Path) -> Iterator[UnpatchedEngine]:
    """Starts an engine process; it does not outlive the test."""
    program = [sys.executable, str(SUPPORT / "unpatched_engine.py"), str(tmp_path / "socket")]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(program, env=UNPATCHED, text=True, stdin=PIPE, stdout=PIPE, stderr=log) as server,
    ):
        assert server.stdout is not None
        started = json.loads(next(line for line in server.stdout if line.startswith("{")))
        process = psutil.Process(started["pid"])
        try:
            yield UnpatchedEngine(server, process, started["group"])
        finally:
            ProcessTree([process.pid]).kill()
            server.kill()


@dataclass
class GraphLayer:
    """Layer with a cache whose graphs have this support."""

    support: Any

    def get_attn_backend(self) -> Any:
        return SimpleNamespace(get_builder_cls=lambda: SimpleNamespace(get_cudagraph_support=lambda *_: self.support))

    def get_kv_cache_spec(self, config: Any) -> None:
        return None


@pytest.fixture
def graphs_of() -> Iterator[Any]:
    """A function that returns vLLM's manager of graphs for a model; afterwards vLLM is as it was."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.worker.gpu import cudagraph_utils

    def graphs_of(
        mode: str = "FULL_AND_PIECEWISE",
        support: str = "ALWAYS",
        sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32),
        drafts: object = None,
        ranks: int = 1,
        loras: tuple[int, ...] = (0,),
        breakable: bool = False,
        of: str = "ModelCudaGraphManager",
    ) -> Any:
        layers = {"attention": GraphLayer(AttentionCGSupport[support]), "experts": object()}
        compilation = SimpleNamespace(
            cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=max(sizes), static_forward_context=layers
        )
        manager = object.__new__(getattr(cudagraph_utils, of))
        manager.__dict__ |= {
            "vllm_config": SimpleNamespace(
                speculative_config=drafts,
                compilation_config=compilation,
                cache_config=SimpleNamespace(use_kda_recoverssm=False),
                parallel_config=SimpleNamespace(data_parallel_size=ranks),
            ),
            "compilation_config": compilation,
            "cudagraph_mode": CUDAGraphMode[mode],
            "max_num_reqs": 8,
            "decode_query_len": 1,
            "varlen_decode": False,
            "ubatch_runner": None,
            "lora_capture_cases": list(loras),
            "use_breakable_cg": breakable,
            "_candidates": {},
            "_capture_descs": {},
            "_graphs_captured": True,
        }
        manager._lora_dispatch_map, manager._max_lora_case = manager._build_lora_dispatch_map()
        manager._init_candidates()
        return manager

    with pytest.MonkeyPatch.context() as restored:
        for function in ("_init_candidates", "dispatch"):
            original = getattr(cudagraph_utils.CudaGraphManager, function)
            original = getattr(original, "__wrapped__", original)
            restored.setattr(cudagraph_utils.CudaGraphManager, function, original)
        yield graphs_of


def dispatched(
    manager: Any, sequences: int, tokens: int, uniform: int | None = None, loras: int = 0
) -> tuple[Any, ...]:
    """Return the mode of the graph for a step, its tokens and sequences, and whether it is for decoding only."""
    graph = manager.dispatch(sequences, tokens, uniform, num_active_loras=loras)
    return graph.cg_mode.name, graph.num_tokens, graph.num_reqs, graph.uniform_token_count == 1


def test_prompt_graphs_vllm_captures_steps_with_prompts_in_parts(graphs_of: Any) -> None:
    manager = graphs_of()
    assert dispatched(manager, 3, 11) == ("PIECEWISE", 16, None, False)
    assert dispatched(manager, 3, 3, 1) == ("FULL", 4, 4, True)
    assert dispatched(manager, 3, 3) == ("PIECEWISE", 4, None, False)  # one has a prompt of one token


@pytest.mark.parametrize("loras", [0, 1])
def test_prompt_graphs_steps_with_prompts_are_whole_graphs(graphs_of: Any, loras: int) -> None:
    from vllm.config import CUDAGraphMode

    prompt_graphs.apply()
    prompt_graphs.apply()
    manager = graphs_of(loras=(0, 1))
    assert manager._capture_descs.keys() == {CUDAGraphMode.FULL}
    captured = [graph.num_tokens for graph in manager._capture_descs[CUDAGraphMode.FULL]]
    assert captured == sorted([1, 2, 4, 8] * 4 + [16, 32] * 2, reverse=True)
    assert dispatched(manager, 3, 11, loras=loras) == ("FULL", 16, 8, False)
    assert dispatched(manager, 1, 3, loras=loras) == ("FULL", 4, 4, False)
    assert dispatched(manager, 3, 3, 1, loras=loras) == ("FULL", 4, 4, True)
    assert dispatched(manager, 3, 3, loras=loras) == ("FULL", 4, 4, True)
    assert dispatched(manager, 1, 33)[0] == "NONE"


@pytest.mark.parametrize(
    "model",
    [
        {"support": "UNIFORM_BATCH"},
        {"mode": "FULL_DECODE_ONLY"},
        {"mode": "FULL"},
        {"mode": "PIECEWISE"},
        {"sizes": (1, 2, 4, 32)},  # a step that decodes 5 sequences has no graph of its own
        {"drafts": SimpleNamespace(uses_dynamic_speculative_decoding=lambda: False)},
        {"ranks": 2},
        {"breakable": True},
        {"of": "CudaGraphManager"},
    ],
    ids=["backend", "decoding", "shared", "parts", "few sizes", "drafts", "ranks", "breakable", "speculator"],
)
def test_prompt_graphs_other_models_keep_vllms_graphs(graphs_of: Any, model: dict[str, Any]) -> None:
    expected = graphs_of(**model)
    prompt_graphs.apply()
    actual = graphs_of(**model)
    assert (actual._capture_descs, actual._candidates) == (expected._capture_descs, expected._candidates)
    assert dispatched(actual, 3, 3) == dispatched(expected, 3, 3)


@slow_and_only_for_another_vllm
def test_worker_process_vllm_leaves_its_engine_in_the_servers_group_and_alive_after_it(
    unpatched_engine: UnpatchedEngine, tmp_path: Path
) -> None:
    assert unpatched_engine.group == os.getpgid(unpatched_engine.server.pid)
    unpatched_engine.server.kill()
    with pytest.raises(psutil.TimeoutExpired):
        unpatched_engine.process.wait(timeout=3)
    assert "[shutdown]" not in (tmp_path / "log").read_text()
