"""Patches of vLLM, one module each, with the fault, its upstream report and the condition for removing the patch.

| patch | fault in vLLM 0.32 | remove when |
| --- | --- | --- |
| `client_requests` | requests of a dead front end run to their end | the engine notices that a client has died |
| `cpu_amx` | no process requests the AMX registers: illegal instruction at the first request | vLLM requests them |
| `cpu_busy_wait` | waiting processes poll with `sched_yield` and delay all others | vLLM sleeps between polls |
| `cpu_expert_map` | the kernel of experts reads beyond its weights with expert parallelism | the kernel maps the ids |
| `cpu_logprob_ranks` | the first request compiles for 8 s, and needs g++ | vLLM compiles nothing if it must not |
| `cpu_lora_slots` | requests without an adapter get the adapter of the last slot | the CPU kernels skip slot -1 |
| `cpu_seeds` | a long prompt with a seed ends the engine | CPU generators are not rewound |
| `cpu_spec_decode` | drafts get uninitialized sampling parameters | vLLM has #55006 and accepts empty logits |
| `detokenizer` | text that ends with U+FFFD is held back and may be lost | only incomplete characters are held back |
| `grammar_timeout` | the constraint of one request can delay all requests | vLLM or xgrammar limits the time |
| `loaded_blocks` | a request that was loaded completely has no LFA state to continue from | connectors ask the model |
| `logprob_token_ids` | other requests of the batch lose their most likely tokens | the sampler merges the results |
| `lora_classes` | a model cannot register LoRA layers or an adapter manager | a model can |
| `model_info` | the first start imports vLLM once more | vLLM does not inspect safe classes elsewhere |
| `priority_preemption` | a preempted request resumes on blocks that were not computed | vLLM evicts such blocks |
| `prompt_graphs` | launching a step with prompts in parts takes longer than the GPU needs | vLLM has a mode for it |
| `worker_death` | a worker that is killed while it starts leaves no message | vLLM reports its exit status |
| `worker_process` | Ctrl-C ends the workers at once; the engine outlives a killed server | vLLM does neither |

`tests/engine/test_patches.py` has a test for each fault, which fails when vLLM no longer has it.
"""
