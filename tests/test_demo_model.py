"""The demo model: what ships loads, answers what it never saw, and came from a seeded generator."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from tools.demo import evaluate
from tools.demo.base_text import documents
from tools.demo.build import LIMIT, size
from tools.demo.chat import render
from tools.demo.task import Task
from tools.demo.train_adapters import RECIPES

FOLDER = Path(__file__).resolve().parent.parent / "engine" / "demo"
TASKS = [recipe.task for recipe in RECIPES.values()]
PROMPTS = 16
# Fewer right answers than these of PROMPTS held-out ones mean that a file or a format is broken.
ENOUGH = {"math": 12, "json": 14, "pirate": 12}


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[Any, Any]]:
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield evaluate.load(FOLDER)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "demo.json").read_text())
    return found


def by_name(task: Task) -> str:
    return task.name


def test_fits_the_package() -> None:
    assert size(FOLDER) <= LIMIT


def test_ranks_and_targets_differ() -> None:
    configs = [
        json.loads((FOLDER / "adapters" / name / "adapter_config.json").read_text())
        for name in RECIPES
    ]
    assert len({config["r"] for config in configs}) == len(configs)
    assert len({config["lora_alpha"] for config in configs}) == len(configs)
    assert len({tuple(config["target_modules"]) for config in configs}) == len(configs)
    assert {config["use_rslora"] for config in configs} == {True, False}
    assert {config["base_model_name_or_path"] for config in configs} == {"demo"}


def test_demo_json_names_what_is_there(demo: dict[str, Any]) -> None:
    assert set(demo["adapters"]) == set(RECIPES)
    for entry in (demo["base"], *demo["adapters"].values()):
        assert (FOLDER / entry["path"]).is_dir()
        assert entry["prompt"]
        assert entry["description"]


def test_documents_are_a_function_of_the_seed() -> None:
    assert list(islice(documents(5), 200)) == list(islice(documents(5), 200))
    assert list(islice(documents(5), 20)) != list(islice(documents(6), 20))


@pytest.mark.parametrize("task", TASKS, ids=by_name)
def test_examples_are_a_function_of_the_seed(task: Task) -> None:
    one, two = Random(3), Random(3)
    for split in ("train", "seen", "heldout"):
        for _ in range(50):
            assert task.draw(one, split) == task.draw(two, split)


@pytest.mark.parametrize("task", TASKS, ids=by_name)
def test_heldout_is_apart_from_training(task: Task) -> None:
    assert not set(task.train_templates) & set(task.heldout_templates)
    rng = Random(4)
    trained = {task.draw(rng, "train").prompt for _ in range(3000)}
    assert not trained & {task.draw(rng, "heldout").prompt for _ in range(1000)}


def test_chat_template_is_what_training_rendered(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    messages = [
        ("system", "Be brief."),
        ("user", " Hello! "),
        ("assistant", "Hi!"),
        ("user", "Bye."),
    ]
    chat = [{"role": role, "content": content} for role, content in messages]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == tokenizer.bos_token + render(messages) + "<|assistant|>"


@pytest.mark.parametrize("text", ["48 + 24 = 72.", '{"name": "Zoë"}', "日本語 ✓\n\tx"])
def test_any_text_survives_the_tokenizer(loaded: tuple[Any, Any], text: str) -> None:
    _, tokenizer = loaded
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("task", TASKS, ids=by_name)
def test_answers_what_it_never_saw(loaded: tuple[Any, Any], task: Task) -> None:
    model, tokenizer = loaded
    rng = Random(evaluate.SEED + 1)
    examples = [task.draw(rng, "heldout") for _ in range(PROMPTS)]
    texts = [
        evaluate.rendered(tokenizer, example.prompt, ("plain", "chat")[index % 2])
        for index, example in enumerate(examples)
    ]

    def right(limit: int) -> tuple[int, int]:
        found = evaluate.answers(model, tokenizer, texts, limit)
        pairs = zip(examples, found, strict=True)
        return (
            sum(evaluate.is_correct(task, example, text) for example, (text, _) in pairs),
            sum(ended for _, ended in found),
        )

    model.set_adapter(task.name)
    correct, ended = right(64)
    assert correct >= ENOUGH[task.name]
    assert ended >= PROMPTS - 1
    with model.disable_adapter():
        assert right(32)[0] == 0


def test_sample_answers_are_what_the_files_say(
    loaded: tuple[Any, Any], demo: dict[str, Any]
) -> None:
    model, tokenizer = loaded
    for name, entry in demo["adapters"].items():
        model.set_adapter(name)
        text = evaluate.rendered(tokenizer, entry["prompt"], "plain")
        assert evaluate.answers(model, tokenizer, [text], 64)[0][0] == entry["answer"]
