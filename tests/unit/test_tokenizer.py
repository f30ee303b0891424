"""Tests of the tokenizer: exact ids, complete characters and preserved spaces."""

import json
from itertools import groupby
from pathlib import Path

import jinja2
import pytest
import xgrammar
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from yuan_grpc.model.tokenizer import HIDDEN, SPECIAL, YuanTokenizer
from yuan_grpc.server.settings import DEMO

DEMO_TOKENIZER = YuanTokenizer(Path(DEMO) / "tokenizer.model")


@pytest.fixture(scope="session")
def yuan(published: Path) -> YuanTokenizer:
    """Published tokenizer."""
    return YuanTokenizer.from_pretrained(published / "tokenizer")


def test_every_golden_text_encodes_exactly(yuan: YuanTokenizer, published: Path) -> None:
    rows = [json.loads(line) for line in (published / "tokenizer_golden.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) > 100
    assert [row["key"] for row in rows if yuan.encode(row["text"]) != row["ids"]] == []


def test_every_golden_text_decodes_as_sentencepiece_decodes_it(yuan: YuanTokenizer, published: Path) -> None:
    model = SentencePieceProcessor(model_file=str(published / "tokenizer" / "tokenizer.model"))
    for line in (published / "tokenizer_golden.jsonl").read_text("utf-8").splitlines():
        plain = [token for token in json.loads(line)["ids"] if 2 < token < model.vocab_size()]
        assert yuan.decode(plain) == model.decode(plain)


def test_special_tokens_have_their_published_ids(yuan: YuanTokenizer) -> None:
    assert (len(yuan), yuan.max_token_id) == (134958, 134957)
    assert (yuan.eos_token_id, yuan.pad_token_id) == (77185, 77188)
    assert yuan.encode("A<sep>B") == [319, 77187, 350]
    assert yuan.encode("<n>") == [529, 29876, 29958]
    assert yuan.encode("<mask><predict><FIM_SUFFIX><FIM_PREFIX><FIM_MIDDLE>") == list(range(134953, 134958))
    assert yuan.convert_tokens_to_ids(["<jupyter_start>", "<n>", "no such piece"]) == [96630, 77186, 0]


@pytest.mark.timeout(60)
@given(st.text())
def test_text_survives_a_round_trip(text: str) -> None:
    lossy = "▁" in text or any(token in text for token in SPECIAL)
    decoded = DEMO_TOKENIZER.decode(DEMO_TOKENIZER.encode(text))
    assert lossy or decoded == text


def check_spans(tokenizer: YuanTokenizer, text: str) -> None:
    """Check that the spans are ordered and within the text, and that each covers exactly its token's characters."""
    tokens = tokenizer.encode_with_offsets(text)
    assert [token for token, *_ in tokens] == tokenizer.encode(text)
    assert [piece for _, piece, *_ in tokens] == tokenizer.convert_ids_to_tokens(tokenizer.encode(text))
    covered = 0
    for (start, end), same_span in groupby(tokens, key=lambda token: token[2:]):
        assert covered == start <= end <= len(text)
        covered = end
        decoded = tokenizer.convert_tokens_to_string([piece for _, piece, *_ in same_span])
        expected = text[start:end].replace("▁", " ")
        assert decoded in (expected, f" {expected}")
    assert covered == len(text)


@given(
    st.lists(st.sampled_from([*SPECIAL, "</s>", "▁", " ", "世", "😀", "é", "\n", "for", "\0"]) | st.text()).map("".join)
)
def test_every_character_is_in_the_span_of_its_token(text: str) -> None:
    check_spans(DEMO_TOKENIZER, text)


def test_every_character_of_the_golden_texts_is_in_the_span_of_its_token(yuan: YuanTokenizer, published: Path) -> None:
    for line in (published / "tokenizer_golden.jsonl").read_text("utf-8").splitlines():
        check_spans(yuan, json.loads(line)["text"])


def test_spans_count_characters() -> None:
    tokens = DEMO_TOKENIZER.encode_with_offsets("世 😀<sep>B")
    assert [(piece, start, end) for _, piece, start, end in tokens] == [
        ("▁", 0, 0),
        ("世", 0, 1),
        ("▁", 1, 2),
        *((f"<0x{byte:02X}>", 2, 3) for byte in "😀".encode()),
        ("<sep>", 3, 8),
        ("▁B", 8, 9),
    ]


@pytest.mark.timeout(60)
def test_a_grammar_does_not_allow_special_tokens_or_padding() -> None:
    rows = len(DEMO_TOKENIZER) + 47
    info = xgrammar.TokenizerInfo.from_huggingface(DEMO_TOKENIZER, vocab_size=rows)
    end = DEMO_TOKENIZER.eos_token_id
    not_text = {*DEMO_TOKENIZER.convert_tokens_to_ids([*SPECIAL, *HIDDEN]), *range(len(DEMO_TOKENIZER), rows)} - {end}
    assert set(info.special_token_ids) == not_text
    assert info.stop_token_ids == [end]
    decoded = {token: info.decoded_vocab[token].decode("utf-8", "replace") for token in range(rows)}
    assert all(
        decoded[token] == DEMO_TOKENIZER.convert_tokens_to_string([piece])
        for piece, token in DEMO_TOKENIZER.get_vocab().items()
    )


@pytest.mark.timeout(60)
@given(st.lists(st.integers(0, len(DEMO_TOKENIZER) - 1), max_size=20), st.integers(0, 20))
def test_the_texts_of_two_halves_join_unless_a_character_is_split(ids: list[int], split: int) -> None:
    def text(part: list[int]) -> str:
        return DEMO_TOKENIZER.convert_tokens_to_string(DEMO_TOKENIZER.convert_ids_to_tokens(part))

    head, tail = text(ids[:split]), text(ids[split:])
    assert "\ufffd" in head + tail or head + tail == text(ids)


def test_no_token_is_added_to_a_prompt() -> None:
    assert DEMO_TOKENIZER.encode("") == []
    assert DEMO_TOKENIZER.encode("A", add_special_tokens=True) == DEMO_TOKENIZER.encode("A", add_special_tokens=False)
    assert DEMO_TOKENIZER.num_special_tokens_to_add() == 0


def test_a_single_token_keeps_its_space_for_vllm() -> None:
    pieces = DEMO_TOKENIZER.convert_ids_to_tokens(DEMO_TOKENIZER.encode("for"))
    assert DEMO_TOKENIZER.convert_tokens_to_string(pieces) == " for"
    assert DEMO_TOKENIZER.decode(DEMO_TOKENIZER.encode("for")) == "for"


def test_skipping_special_tokens_keeps_separators_and_code_markers() -> None:
    ids = [DEMO_TOKENIZER.convert_tokens_to_ids(token) for token in (*HIDDEN, "<sep>", "<commit_msg>", "<mask>")]
    assert DEMO_TOKENIZER.decode(ids, skip_special_tokens=True) == "<sep><commit_msg><mask>"
    assert DEMO_TOKENIZER.decode(ids) == "".join(HIDDEN) + "<sep><commit_msg><mask>"


def test_unknown_ids_decode_to_nothing() -> None:
    assert DEMO_TOKENIZER.decode([len(DEMO_TOKENIZER), 10**6]) == ""


@pytest.mark.parametrize(("side", "kept"), [("left", slice(-2, None)), ("right", slice(None, 2))])
def test_truncation_removes_the_chosen_end(side: str, kept: slice) -> None:
    tokenizer = YuanTokenizer(Path(DEMO) / "tokenizer.model", truncation_side=side)
    ids = tokenizer.encode("世界上最高的山")
    assert tokenizer.encode("世界上最高的山", truncation=True, max_length=2) == ids[kept]


def test_a_list_of_texts_is_encoded_at_once() -> None:
    encoded = DEMO_TOKENIZER(["山", "河"])
    assert encoded["input_ids"] == [DEMO_TOKENIZER.encode("山"), DEMO_TOKENIZER.encode("河")]


def test_a_conversation_is_formatted_as_in_training() -> None:
    turns = [
        {"role": "user", "content": "问"},
        {"role": "assistant", "content": "答"},
        {"role": "user", "content": "再问"},
    ]
    assert DEMO_TOKENIZER.apply_chat_template(turns) == "问<n>答<n>再问<sep>"


def test_the_template_in_jinja_formats_a_conversation_equally() -> None:
    messages = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    info = DEMO_TOKENIZER.describe()
    template = jinja2.Template(info["chat_template"])
    expected = DEMO_TOKENIZER.apply_chat_template(messages)
    assert (
        template.render(messages=messages) == template.render(messages=messages, add_generation_prompt=True) == expected
    )
    assert template.render(messages=messages, add_generation_prompt=False) == "问<n>答"
    assert DEMO_TOKENIZER.encode(info["eos_token"]) == [DEMO_TOKENIZER.eos_token_id]


def test_the_tokenizer_of_another_model_is_rejected(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("only a few words\n" * 10)
    SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=20, model_type="bpe", minloglevel=2
    )
    with pytest.raises(ValueError, match="not a Yuan tokenizer: it has no <eod>"):
        YuanTokenizer.from_pretrained(tmp_path)


def test_a_word_inside_a_text_has_another_encoding(demo: Path) -> None:
    tokenizer = YuanTokenizer.from_pretrained(demo)
    after_a_space, inside_a_text = tokenizer.encode_word("山")
    assert tokenizer.convert_ids_to_tokens(after_a_space)[0].startswith("▁")
    assert tokenizer.convert_ids_to_tokens(inside_a_text) == ["山"]
