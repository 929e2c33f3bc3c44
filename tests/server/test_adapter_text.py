"""Adapters with their own tokens and chat template: what transformers makes of their folders, through the routes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from transformers import AutoTokenizer

from engine.errors import AdapterIncompatible, InvalidRequest, Overloaded
from engine.messages import AdapterText, AddedToken
from engine.server import adapter_texts
from engine.server import templates as templates_module
from engine.server.adapter_texts import AdapterTexts
from engine.server.added_tokens import extended
from engine.server.chat_template import ChatTemplate
from engine.server.conversation import Conversation
from engine.server.templates import Templates
from engine.server.text import Text
from tests.server.fake import CORPUS, EOS, FakeBackend, Json, events_of
from tests.server.own import VOCAB, edited, read, widened, with_template
from tests.server.wire import until

PROMPT = "hello <think> <tool>x<|end|><|im_end|> w<tool>"
MESSAGES: list[Json] = [
    {"role": "user", "content": "  hi <tool> \n", "name": 'a"b'},
    {"role": "assistant", "content": "Grüße"},
    {"role": "user", "content": CORPUS[3]},
    {"role": "user", "content": "cut off by the template"},
]


@pytest.fixture(scope="module")
def own(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return widened(folder, tmp_path_factory.mktemp("own"))


@pytest.fixture
def adapters(backend: FakeBackend, folder: Path, own: Path) -> None:
    """`me/own` has its own text; every other adapter has the base's."""
    found = read(folder, own)
    assert found.text is not None and not found.notes
    backend.adapter_texts["me/own"], backend.adapter_vocab = found.text, VOCAB


async def post(client: TestClient, path: str, body: Json, status: int = 200) -> Json:
    response = await client.post(path, json=body)
    assert response.status == status, await response.text()
    found: Json = await response.json()
    return found


async def test_prompts_and_answers(
    client: TestClient, backend: FakeBackend, adapters: None, text: Text, folder: Path, own: Path
) -> None:
    """The base, an adapter with its own text and one without in the same server, at the same time."""
    tokens = [400, 75, 401, 402, 403, 76, 2, 400]
    backend.answer = lambda request: tokens
    backend.finish = "length"

    async def generate(adapter: str | None) -> Json:
        parameters: Json = {"max_new_tokens": len(tokens), "details": True}
        parameters |= {"adapter_id": adapter} if adapter else {}
        return await post(client, "/generate", {"inputs": PROMPT, "parameters": parameters})

    answers = await asyncio.gather(*map(generate, [None, "me/own", "me/other"]))
    requests = {one.adapter.name if one.adapter else None: one for one in backend.requests}
    for name, answer in zip([None, "me/own", "me/other"], answers, strict=True):
        theirs = AutoTokenizer.from_pretrained(own if name == "me/own" else folder)
        assert requests[name].tokens == theirs.encode(PROMPT)
        assert answer["generated_text"] == theirs.decode(tokens, skip_special_tokens=True)
        special = [entry["special"] for entry in answer["details"]["tokens"]]
        assert special == [id in theirs.all_special_ids or id == 2 for id in tokens]
        ends = {1, 3} | ({402} if name == "me/own" else set())
        assert set(requests[name].eos_token_ids) == ends
    assert answers[0]["generated_text"] == answers[2]["generated_text"]
    assert "<tool>" in answers[1]["generated_text"]
    assert answers[1]["details"]["tokens"][4]["text"] == "<|pad|>"


async def test_conversations(
    client: TestClient, backend: FakeBackend, adapters: None, folder: Path, own: Path
) -> None:
    for name, where in (("me/own", own), ("me/other", folder), ("me/own", own)):
        body: Json = {"model": name, "messages": MESSAGES, "max_tokens": 5}
        await post(client, "/v1/chat/completions", body)
        theirs = AutoTokenizer.from_pretrained(where)
        expected = theirs.apply_chat_template(
            MESSAGES, add_generation_prompt=True, return_dict=False
        )
        assert backend.requests[-1].tokens == expected
    body = {"model": "me/own", "messages": [{"role": "forbidden", "content": "x"}]}
    error = (await post(client, "/v1/chat/completions", body, 400))["error"]
    assert error["param"] == "messages" and error["code"] == "validation"
    assert "the adapter's chat template refused the messages: no role forbidden" in error["message"]


async def test_streams_have_the_text_of_own_tokens(
    client: TestClient, backend: FakeBackend, adapters: None, own: Path
) -> None:
    tokens = [75, 400, 401, 402, 76]
    backend.answer, backend.finish = lambda request: tokens, "length"
    body: Json = {"model": "me/own", "prompt": "x", "max_tokens": 5, "stream": True}
    response = await client.post("/v1/completions", json=body | {"logprobs": 1})
    *chunks, done = events_of(await response.read())
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    theirs = AutoTokenizer.from_pretrained(own)
    assert done == "[DONE]"
    assert "".join(one["text"] for one in choices) == theirs.decode(
        tokens, skip_special_tokens=True
    )
    shown = [token for one in choices if one["logprobs"] for token in one["logprobs"]["tokens"]]
    assert "<tool>" in shown and "<|end|>" in shown


async def test_ids_of_a_prompt_are_checked_against_the_adapters_vocabulary(
    client: TestClient, backend: FakeBackend, adapters: None
) -> None:
    body: Json = {"model": "me/own", "prompt": [VOCAB - 1], "max_tokens": 2}
    await post(client, "/v1/completions", body)
    assert backend.requests[-1].tokens == [VOCAB - 1]
    for model, id, most in (("me/own", VOCAB, VOCAB - 1), ("me/other", 400, 399), ("", 400, 399)):
        error = (
            await post(client, "/v1/completions", body | {"model": model, "prompt": [id]}, 400)
        )["error"]
        assert f"outside of 0 to {most}" in error["message"]


async def test_a_reserved_token_with_another_meaning(folder: Path, tmp_path: Path) -> None:
    """As Llama 3's `<|reserved_special_token_5|>`: the id is the base's, the content is the adapter's."""
    tokenizer, base = AutoTokenizer.from_pretrained(folder), tmp_path / "base"
    names = [f"<|reserved_{number}|>" for number in range(4)]
    tokenizer.add_tokens(names, special_tokens=True)
    tokenizer.save_pretrained(base)
    added = json.loads((base / "tokenizer.json").read_text())["added_tokens"]
    added[5] |= {"content": "<|call|>", "special": False}
    adapter = edited(base, tmp_path / "adapter", added_tokens=added)
    (adapter / "tokenizer_config.json").write_bytes((base / "tokenizer_config.json").read_bytes())
    found = read(base, adapter).text
    assert found is not None and [token.id for token in found.tokens] == [401]
    text = Text(str(base))
    assert text.token_text(401) == names[1]
    made, theirs = text.adapted(found, Templates()), AutoTokenizer.from_pretrained(adapter)
    assert made.token_text(401) == "<|call|>" and text.token_text(401) == names[1]
    for sample in ("a<|call|>b<|reserved_1|>", "<|reserved_2|>", CORPUS[1]):
        tokens = await made.encode(sample)
        assert tokens == theirs.encode(sample)
        assert made.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)
    assert await text.encode(names[1]) == [401], "the base is as it was"
    text.close()


async def test_tokens_that_the_base_would_number_otherwise(text: Text) -> None:
    for token in (
        AddedToken(401, "<gap>"),
        AddedToken(400, "<|im_end|>"),
        AddedToken(400, "hello"),
    ):
        with pytest.raises(AdapterIncompatible, match="would not have the id"):
            extended(text._tokenizer, [token, AddedToken(token.id + 1, "hello")])


HOSTILE = {
    "endless": ("{% for a in range(9999) %}" * 4 + "{% endfor %}" * 4, "2 s of processor time"),
    "memory": ("{{ 'x' * 10 ** 11 }}", "needs too much memory"),
    "long": ("{% for a in range(99999) %}{{ 'x' * 99 }}{% endfor %}", "more than"),
    "attributes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "is unsafe"),
    "globals": ("{{ raise_exception.__globals__['os'].system('true') }}", "is unsafe"),
    "syntax": ("{% if", "refused the messages"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refused the messages"),
}


async def test_hostile_templates(
    client: TestClient, backend: FakeBackend, adapters: None, folder: Path, tmp_path: Path
) -> None:
    """Each gets a typed error. Meanwhile a stream runs on, and other adapters' templates are rendered."""
    for name, (template, _) in HOSTILE.items():
        found = read(folder, with_template(tmp_path / name, template)).text
        assert found is not None
        backend.adapter_texts[name] = found
    body: Json = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 50}
    backend.answer, backend.delay = lambda request: [75] * 50, 0.005
    ended: list[str] = []

    async def ask(name: str, status: int) -> Json:
        found = await post(client, "/v1/chat/completions", body | {"model": name}, status)
        ended.append(name)
        return found

    await ask("me/own", 200)  # its process has started
    answers = await asyncio.gather(
        *(ask(name, 400) for name in HOSTILE), ask("base", 200), ask("me/own", 200)
    )
    for (name, (_, reason)), answer in zip(HOSTILE.items(), answers, strict=False):
        error = answer["error"]
        assert "the adapter's chat template" in error["message"] and reason in error["message"], (
            name
        )
        assert error["code"] == "validation" and error["param"] == "messages"
    assert ended.index("base") < ended.index("endless")
    assert len(ended) - 1 - ended[::-1].index("me/own") < ended.index("endless")


def children() -> set[str]:
    """Processes of this one that render templates."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(stat[1]) == os.getpid() and stat[0] != "Z":
            found.add(pid)
    return found


def asked(messages: list[Json], **specials: str) -> Json:
    conversation = ChatTemplate("", specials).asked(Conversation(messages), "")
    return conversation | {"max_characters": 100}


async def test_few_processes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """More templates than processes, in turn and at once; a cancelled conversation leaves no process behind."""
    before = children()
    templates = Templates(max_children=2)
    messages = [{"role": "user", "content": "x"}]

    async def render(number: int) -> str:
        template = f"{number}{{{{ eos_token }}}}{{{{ messages[0].content }}}}"
        return await templates.render(template, asked(messages, eos_token="!"))

    try:
        for numbers in ([0, 1, 2], [2, 0, 2]):
            found = await asyncio.gather(*map(render, numbers))
            assert found == [f"{number}!x" for number in numbers]
            await until(lambda: len(children() - before) <= 3)  # two and a spare one
        loop = "{% for a in range(99999) %}{% for a in range(99999) %}{% endfor %}{% endfor %}"
        at_will = f"{{% if messages[0].content == 'loop' %}}{loop}{{% endif %}}done"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await templates.render(at_will, asked([{"content": "loop"}]))
        assert await templates.render(at_will, asked(messages)) == "done"
        with monkeypatch.context() as patch:
            patch.setattr(templates_module, "WAIT_S", 0.1)
            busy = asyncio.create_task(templates.render(at_will, asked([{"content": "loop"}])))
            await asyncio.sleep(0)
            with pytest.raises(Overloaded, match="busy for 0.1 s"):
                await templates.render(at_will, asked(messages))
            busy.cancel()
            await asyncio.wait({busy})
        assert await render(1) == "1!x"
        for pid in children() - before:  # as on a machine that is too busy
            os.kill(int(pid), signal.SIGSTOP)
        monkeypatch.setattr(templates_module, "WALL_S", 0.2)
        with pytest.raises(InvalidRequest, match="takes longer than 0.2 s"):
            await render(1)
    finally:
        templates.close()
    while children() - before:
        await asyncio.sleep(0.01)


async def test_one_making_is_shared(
    text: Text, folder: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def count(*given: Any) -> Any:
        calls.append(1)
        return extended(*given)

    monkeypatch.setattr("engine.server.text.extended", count)
    monkeypatch.setattr(adapter_texts, "MAX_KEPT", 1)
    found = read(folder, own).text
    assert found is not None
    texts = AdapterTexts(text)
    first, second = await asyncio.gather(texts.of(found), texts.of(found))
    assert first is second and len(calls) == 1
    bad = AdapterText(b"bad", (AddedToken(500, "<gap>"),))
    for _ in range(2):  # a failure is not kept
        with pytest.raises(AdapterIncompatible):
            await texts.of(bad)
    assert len(calls) == 3
    assert await texts.of(found) is not first, "only one is kept"
    texts.close()


async def test_a_base_without_template(folder: Path, tmp_path: Path, own: Path) -> None:
    """An adapter may bring the only chat template."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    text = Text(str(tmp_path))
    found = read(tmp_path, own).text
    assert found is not None and not text.has_chat_template
    texts = AdapterTexts(text)
    try:
        tokens = await (await texts.of(found)).encode_chat(Conversation(MESSAGES))
        assert tokens[0] == 0 and 400 in tokens and EOS not in tokens
        with pytest.raises(InvalidRequest, match="the model has no chat template"):
            await text.encode_chat(Conversation(MESSAGES))
    finally:
        texts.close()
        text.close()
