from __future__ import annotations

import asyncio
import json
import random
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engine.errors import ConfigError, InvalidRequest, ModelError
from engine.server.conversation import Conversation
from engine.server.text import Text
from tests.server.fake import CORPUS, write_tokenizer

MIXED = "Hé 😀 漢字👨‍👩‍👧 ok\n\n🚀"


def streamed(text: Text, tokens: list[int], prompt: list[int] | None = None) -> list[str]:
    stream = text.stream(prompt or [])
    return [*(stream.push(token) for token in tokens), stream.flush()]


@pytest.mark.parametrize("sample", [*CORPUS, MIXED, "", " ", "�", "a�", "�a"])
async def test_a_stream_gives_back_what_was_encoded(text: Text, sample: str) -> None:
    assert "".join(streamed(text, await text.encode(sample))) == sample


@pytest.mark.parametrize("sample", ["hello w", "héllo 😀😀 w 漢字", "w", "a  b", "�w"])
async def test_a_stream_of_sentencepiece_gives_back_what_was_encoded(
    sentencepiece: Text, sample: str
) -> None:
    tokens = await sentencepiece.encode(sample, special=False)
    assert "".join(streamed(sentencepiece, tokens)) == sentencepiece.decode(tokens) == sample


async def test_an_answer_keeps_the_space_of_its_first_word(sentencepiece: Text) -> None:
    prompt = await sentencepiece.encode("hello")
    answer = (await sentencepiece.encode("hello w", special=False))[len(prompt) :]
    assert "".join(streamed(sentencepiece, answer, prompt)) == " w"
    assert sentencepiece.decode(answer, prompt) == " w"


@pytest.mark.parametrize("seed", range(40))
def test_any_tokens_stream_to_what_they_decode_to(text: Text, seed: int) -> None:
    """Random tokens are mostly invalid UTF-8, the worst that a model can do."""
    chosen = random.Random(seed)
    tokens = [chosen.randrange(400) for _ in range(300)]
    if seed % 2:  # bytes beyond ASCII only: characters hardly ever complete
        tokens = [token for token in tokens if "\ufffd" in text.token_text(token)]
    pieces = streamed(text, tokens)
    assert "".join(pieces) == text.decode(tokens)
    assert max(map(len, pieces)) < 100


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_of_sentencepiece_stream_without_error(sentencepiece: Text, seed: int) -> None:
    chosen = random.Random(seed)
    tokens = [chosen.randrange(sentencepiece.vocab_size) for _ in range(300)]
    assert len("".join(streamed(sentencepiece, tokens))) > 100


@pytest.mark.parametrize("bytes", [b"\x80", b"\xf0", b"\xf0\x9f\x98\xff", b"\xe6\xbc\x80\x80"])
def test_invalid_bytes_do_not_wait_for_ever(text: Text, bytes: bytes) -> None:
    ids = {text.token_bytes(id): id for id in range(400)}
    tokens = [ids[bytes[at : at + 1]] for at in range(len(bytes))] * 50
    pieces = streamed(text, tokens)
    assert "".join(pieces) == text.decode(tokens)
    longest = max(len(run) for run in "".join(".x"[not piece] for piece in pieces).split("."))
    assert longest <= 10


def test_no_piece_splits_a_character(text: Text) -> None:
    tokens = text._tokenizer.encode(MIXED).ids
    assert not any("\ufffd" in piece for piece in streamed(text, tokens))


def test_an_incomplete_character_comes_out_at_the_end(text: Text) -> None:
    tokens = text._tokenizer.encode("a😀").ids[:-1]
    pieces = streamed(text, tokens)
    assert pieces[0] == "a" and pieces[-1] == "\ufffd" and set(pieces[1:-1]) <= {""}


def test_special_tokens_are_no_text(text: Text) -> None:
    assert text.decode([0, 40, 1, 41, 3]) == text.decode([40, 41])
    assert text.token_text(1) == "</s>"


def test_token_bytes_make_the_text(text: Text, sentencepiece: Text) -> None:
    tokens = text._tokenizer.encode(MIXED).ids
    assert b"".join(map(text.token_bytes, tokens)) == MIXED.encode()
    tokens = sentencepiece._tokenizer.encode("héllo 😀 w").ids
    assert b"".join(map(sentencepiece.token_bytes, tokens)) == " héllo 😀 w".encode()


async def test_offsets_count_characters(text: Text) -> None:
    for sample in CORPUS:
        spans = await text.tokenize(sample)
        assert [span.id for span in spans] == await text.encode(sample)
        assert all(span.text == sample[span.start : span.stop] for span in spans)
        assert spans[-1].stop == len(sample)


async def test_the_chat_template_is_transformers(text: Text, folder: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": MIXED}]
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert await text.encode_chat(Conversation(messages)) == expected
    long = [{"role": "user", "content": MIXED * 1000}]
    expected = theirs.apply_chat_template(long, add_generation_prompt=True, return_dict=False)
    assert await text.encode_chat(Conversation(long)) == expected


def test_a_template_that_fails_is_the_clients_error(text: Text) -> None:
    with pytest.raises(InvalidRequest, match="role forbidden is not allowed") as caught:
        text.chat.render(Conversation([{"role": "forbidden", "content": "x"}]))
    assert caught.value.field == "messages"


def test_a_missing_template_names_the_remedy(tmp_path: Path) -> None:
    text = Text(str(write_tokenizer(tmp_path, chat=False)))
    assert not text.has_chat_template
    with pytest.raises(InvalidRequest, match="--tokenizer-config-path"):
        text.chat.render(Conversation([{"role": "user", "content": "x"}]))
    text.close()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.json", json.dumps({"chat_template": "X{{ messages[0].content }}"})),
        (
            "t.json",
            json.dumps(
                {
                    "chat_template": [
                        {"name": "tool_use", "template": "no"},
                        {"name": "default", "template": "X{{ messages[0].content }}"},
                    ]
                }
            ),
        ),
        ("t.jinja", "X{{ messages[0].content }}"),
    ],
)
def test_a_template_of_ones_own(tmp_path: Path, folder: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    text = Text(str(folder), str(tmp_path / name))
    assert text.chat.render(Conversation([{"role": "user", "content": "yz"}])) == "Xyz"
    text.close()


@pytest.mark.parametrize("content", ["{}", "[", "[]"])
def test_a_bad_template_file_is_a_config_error(tmp_path: Path, folder: Path, content: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        Text(str(folder), str(tmp_path / "t.json"))
    assert caught.value.field == "tokenizer_config_path"


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        Text(str(tmp_path))


def test_eos_is_the_union(text: Text, tmp_path: Path) -> None:
    assert text.eos_token_ids == [1, 3]
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": 2, "model_type": "llama"}')
    other = Text(str(tmp_path))
    assert other.eos_token_ids == [1, 2]
    other.close()


async def test_long_prompts_do_not_block_the_loop(text: Text) -> None:
    """The loop keeps turning while a megabyte is tokenized."""
    gaps: list[float] = []

    async def turn() -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(0.001)
            gaps.append(time.perf_counter() - start)

    turning = asyncio.create_task(turn())
    start = time.perf_counter()
    tokens = await text.encode("".join(CORPUS) * 3000)
    took = time.perf_counter() - start
    turning.cancel()
    assert len(tokens) > 100_000
    assert max(gaps) < took * 0.7
