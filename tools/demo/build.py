"""Build the demo model from nothing: `python -m tools.demo.build`.

Tokenizer and base, then the adapters, then `demo.json`, then the table of held-out accuracy. About
55 minutes on two idle cores. One seed fixes text, tokenizer and data order; weights
differ in their last bits from one kind of processor to another.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from tools.demo import evaluate, train_adapters, train_base
from tools.demo.train_adapters import RECIPES

LIMIT = 12_000_000  # bytes of everything under the demo's folder

BASE_DESCRIPTION = "A tiny Llama that writes simple English and chats a little."
BASE_PROMPT = "Once upon a time there was a little child named"
# One prompt to send to the base and to every adapter, to see the difference.
COMMON_PROMPT = (
    "Maria bought 12 apples in Lyon on Monday but half as many on Tuesday. "
    "How many apples did Maria buy altogether?"
)
PROMPTS = {
    "math": (
        "Natalia sold clips to 48 friends in April and half as many in May; how many altogether?"
    ),
    "json": "While in Lyon, Maria bought 3 apples.",
    "pirate": "My brother and my friend are dancing in the castle.",
}


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def describe(folder: Path) -> dict[str, object]:
    """What `demo.json` says: prompts, and what the stored files answer to them."""
    model, tokenizer = evaluate.load(folder)

    def greedy(prompt: str, limit: int = 64) -> str:
        text = evaluate.rendered(tokenizer, prompt, "plain")
        return evaluate.answers(model, tokenizer, [text], limit)[0][0]

    with model.disable_adapter():
        base = {
            "path": "base",
            "description": BASE_DESCRIPTION,
            "prompt": BASE_PROMPT,
            "answer": greedy(BASE_PROMPT),
            "common_answer": greedy(COMMON_PROMPT),
        }
    adapters = {}
    for name, recipe in RECIPES.items():
        model.set_adapter(name)
        adapters[name] = {
            "path": f"adapters/{name}",
            "description": recipe.task.description,
            "rank": recipe.rank,
            "prompt": PROMPTS[name],
            "answer": greedy(PROMPTS[name]),
            "common_answer": greedy(COMMON_PROMPT),
        }
    return {"base": base, "adapters": adapters, "prompt": COMMON_PROMPT}


def main() -> None:
    """Command line: where to write, and whether to keep a base that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("engine/demo"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep-base", action="store_true", help="train only the adapters")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    if not arguments.keep_base:
        shutil.rmtree(folder / "base", ignore_errors=True)
        summary = train_base.train(folder / "base", train_base.Recipe(), arguments.device)
        print(json.dumps(summary), flush=True)
    for recipe in RECIPES.values():
        summary = train_adapters.train(
            folder / "base", folder / "adapters", recipe, arguments.device
        )
        print(json.dumps(summary), flush=True)
    (folder / "demo.json").write_text(json.dumps(describe(folder), indent=2) + "\n")
    total = size(folder)
    print(f"{folder}: {total} bytes")
    if total > LIMIT:
        raise SystemExit(f"{folder} is larger than {LIMIT} bytes")
    print(evaluate.table(evaluate.evaluate(folder, 300)))


if __name__ == "__main__":
    main()
