"""Reading of prompts and problems."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from yuan_grpc.humaneval.dataset import ProblemError, read_problems, read_prompts

TASKS = [
    {"task_id": f"set/{i}", "prompt": f"加 {i}\n", "entry_point": "f", "test": "def check(candidate): pass\n"}
    for i in range(12)
]


def test_gzip_crlf_and_a_byte_order_mark_are_accepted(tmp_path: Path) -> None:
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in TASKS)
    plain, compressed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_bytes(b"\xef\xbb\xbf" + text.encode())
    compressed.write_bytes(gzip.compress(text.encode()))
    assert read_problems(plain) == read_problems(compressed)
    assert read_prompts(plain) == {row["task_id"]: row["prompt"] for row in TASKS}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no tasks"),
        ("{", "line 1: not JSON"),
        ("[]", "line 1: must be an object, not list"),
        ('{"task_id": "a"}', "line 1: `prompt` must be text, not None"),
        ('{"task_id": 1, "prompt": ""}', "`task_id` must be text, not 1"),
        ('{"task_id": "a", "prompt": ""}\n\n{"task_id": "a", "prompt": ""}', "line 3: duplicate task 'a'"),
    ],
)
def test_an_invalid_file_is_rejected_with_the_line_number(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ProblemError, match=message):
        read_prompts(path)


def test_the_published_prompts_are_read_verbatim(published: Path) -> None:
    prompts = read_prompts(published / "human-eval-gpt4-translation-fixed5.jsonl")
    assert len(prompts) == 164
    assert all("```python\n" in prompt and "\r" not in prompt for prompt in prompts.values())
