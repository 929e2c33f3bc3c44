"""An adapter with its own tokens and chat template, from its folder to the answer: as transformers and PEFT."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from aiohttp.test_utils import TestClient
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from engine.config import AdapterConfig, EngineConfig, MemoryConfig, ModelConfig, SchedulerConfig
from engine.process import LocalBackend
from engine.server.app import build_app
from engine.server.text import Text
from tests import tiny
from tests.server.conftest import OwnServer
from tests.server.fake import Json, write_tokenizer
from tests.server.own import VOCAB, widened

MESSAGES = [{"role": "user", "content": "hello <tool> w"}]
NEW_TOKENS = 24


def resized(model: PreTrainedModel) -> PreTrainedModel:
    """The model with rows for the tokens that the adapter adds."""
    model.resize_token_embeddings(VOCAB, mean_resizing=False)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            added = module.weight[400:]
            added.copy_(torch.randn(added.shape, generator=generator) * 0.3)
    return model


@pytest.mark.filterwarnings("ignore")  # peft's advice on resized embeddings
async def test_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`own` widens the vocabulary, with rows of its own in embedding and head."""
    monkeypatch.setitem(tiny.SMALL, "vocab_size", 400)
    base = tmp_path / "base"
    model = tiny.make_model("llama", base)
    write_tokenizer(base)
    tiny.make_adapter(model, tmp_path / "plain", 1).unload()
    wide = tiny.make_adapter(resized(model), tmp_path / "own", 2)
    wide.save_pretrained(str(tmp_path / "own"), save_embedding_layers=True)
    widened(base, tmp_path / "own")
    config = EngineConfig(
        model=ModelConfig(model_id=str(base), dtype="float32"),
        adapters=AdapterConfig(
            adapter_source="local", adapter_root=(str(tmp_path),), host_cache_gb=0.02
        ),
        scheduler=SchedulerConfig(max_total_tokens=200),
        memory=MemoryConfig(cpu_memory_gb=0.05, num_threads=1),
    )
    text, backend = Text(str(base)), await LocalBackend.start(config)
    client: TestClient = TestClient(OwnServer(build_app(backend, text, config)))
    await client.start_server()

    async def ask(name: str) -> Json:
        body: Json = {"model": name, "messages": MESSAGES, "temperature": 0}
        response = await client.post("/v1/chat/completions", json=body | {"max_tokens": NEW_TOKENS})
        found: Json = await response.json()
        return found

    try:
        answers = await asyncio.gather(*map(ask, ("own", "plain", "base")))
    finally:
        await client.close()
        await backend.close()
        text.close()
    for name, answer in zip(("own", "plain", "base"), answers, strict=True):
        expected, prompt_tokens = theirs(base, None if name == "base" else tmp_path / name)
        assert answer["choices"][0]["message"]["content"] == expected, name
        assert ("<t" in expected) == (name == "own"), "it says tokens of its own"
        assert answer["usage"]["prompt_tokens"] == prompt_tokens


def theirs(base: Path, adapter: Path | None) -> tuple[str, int]:
    """The text that transformers and PEFT generate, and the number of prompt tokens."""
    has_own = adapter is not None and (adapter / "tokenizer.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(adapter if has_own else base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(resized(model) if has_own else model, adapter)
    prompt = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    ends = [1, 3, tokenizer.eos_token_id]
    with torch.no_grad():
        found = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0,
        )
    answer = found[0, prompt.shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True), prompt.shape[1]
