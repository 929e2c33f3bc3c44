"""Measure the shipped demo files: the base's perplexity, and every adapter against the base.

Weights are read from the stored float16 files and run in float32. Prompts are drawn with a seed that
training does not use; `seen` has known templates with new combinations of values, `heldout` has new
templates too. The rows are printed as a Markdown table, or as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from tools.demo import task_math
from tools.demo.base_text import documents
from tools.demo.task import Example, Split, Task
from tools.demo.train_adapters import RECIPES

SEED = 7_000_001


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: shares of the prompts of one split, in one form."""

    task: str
    model: str
    split: Split
    form: str  # "plain" prompt or "chat" template
    prompts: int
    correct: float  # math: the final number; others: the whole answer
    valid: float | None  # json: parses as an object
    ended: float  # stopped at EOS by itself


def load(folder: Path, device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base with every adapter loaded, and the tokenizer."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model: PeftModel | None = None
    for name in RECIPES:
        path = str(folder / "adapters" / name)
        if model is None:
            model = PeftModel.from_pretrained(base, path, adapter_name=name)
        else:
            model.load_adapter(path, adapter_name=name)
    assert model is not None
    return model.float().to(device).eval(), tokenizer


def rendered(tokenizer: PreTrainedTokenizerBase, prompt: str, form: str) -> str:
    """The text that the model continues, BOS included."""
    if form == "plain":
        return f"{tokenizer.bos_token}{prompt}"
    message = {"role": "user", "content": prompt}
    return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_new_tokens: int = 96,
) -> list[tuple[str, bool]]:
    """Greedy continuations, and whether each ended by itself; batches of like length."""
    found: list[tuple[str, bool]] = [("", False)] * len(texts)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for at in range(0, len(order), 100):
        part = order[at : at + 100]
        batch = tokenizer(
            [texts[index] for index in part],
            return_tensors="pt", padding=True, add_special_tokens=False,
        ).to(model.device)  # fmt: skip
        output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        for index, ids in zip(part, output[:, batch["input_ids"].shape[1] :], strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            found[index] = (text.strip(), tokenizer.eos_token_id in ids.tolist())
    return found


def is_correct(task: Task, example: Example, text: str) -> bool:
    """Whether an answer is right: math by its number, json by its value, others as text."""
    if task.name == "math":
        return task_math.result(text) == task_math.result(example.answer)
    if task.name == "json":
        return _parsed(text) == json.loads(example.answer)
    return text == example.answer


def _parsed(text: str) -> object | None:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def measure(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    split: Split,
    form: str,
    count: int,
) -> list[Row]:
    """The base's row and the adapter's, on the same prompts."""
    task = RECIPES[name].task
    rng = Random(SEED)
    examples = [task.draw(rng, split) for _ in range(count)]
    texts = [rendered(tokenizer, example.prompt, form) for example in examples]

    def row(who: str, found: list[tuple[str, bool]]) -> Row:
        pairs = list(zip(examples, found, strict=True))
        valid = sum(isinstance(_parsed(text), dict) for text, _ in found) / len(found)
        return Row(
            task=name,
            model=who,
            split=split,
            form=form,
            prompts=len(found),
            correct=sum(is_correct(task, example, text) for example, (text, _) in pairs)
            / len(pairs),
            valid=valid if name == "json" else None,
            ended=sum(ended for _, ended in found) / len(found),
        )

    rows = []
    if split == "heldout":
        fewer = texts[:100]
        with model.disable_adapter():
            base = answers(model, tokenizer, fewer)
        examples, kept = examples[: len(fewer)], examples
        rows.append(row("base", base))
        examples = kept
    model.set_adapter(name)
    rows.append(row(name, answers(model, tokenizer, texts)))
    return rows


@torch.inference_mode()
def perplexity(model: PeftModel, tokenizer: PreTrainedTokenizerBase, count: int = 400) -> float:
    """The base's perplexity per token on unseen documents."""
    total, tokens = 0.0, 0
    with model.disable_adapter():
        for text in islice(documents(SEED), count):
            ids = tokenizer(text + tokenizer.eos_token, return_tensors="pt")["input_ids"][:, :1024]
            ids = ids.to(model.device)
            loss = model(input_ids=ids, labels=ids).loss
            total += float(loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    return math.exp(total / tokens)


def evaluate(folder: Path, count: int, device: str = "cpu") -> dict[str, object]:
    """Every row, and the perplexity."""
    torch.set_num_threads(2)
    model, tokenizer = load(folder, device)
    rows: list[Row] = []
    for name in RECIPES:
        for split, form in (("heldout", "plain"), ("heldout", "chat"), ("seen", "plain")):
            rows += measure(model, tokenizer, name=name, split=split, form=form, count=count)
    return {"perplexity": perplexity(model, tokenizer), "rows": [asdict(row) for row in rows]}


def table(result: dict[str, object]) -> str:
    """The result as Markdown."""
    lines = [
        "| task | model | split | form | prompts | correct | valid JSON | ended by EOS |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        valid = "" if row["valid"] is None else f"{row['valid']:.1%}"
        lines.append(
            f"| {row['task']} | {row['model']} | {row['split']} | {row['form']} | {row['prompts']} "
            f"| {row['correct']:.1%} | {valid} | {row['ended']:.1%} |"
        )
    lines.append(f"\nBase perplexity on held-out text: {result['perplexity']:.2f} per token.")
    return "\n".join(lines)


def main() -> None:
    """Command line: which files, how many prompts, which output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("engine/demo"))
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = evaluate(arguments.folder, arguments.prompts)
    print(json.dumps(result, indent=2) if arguments.json else table(result))


if __name__ == "__main__":
    main()
