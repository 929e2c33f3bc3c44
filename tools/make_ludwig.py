"""Train the adapter in tests/data/ludwig with Ludwig: `python tools/make_ludwig.py` (tests/data/ludwig/README.md).

Ludwig fine-tunes the demo's base model for a few steps and saves the result. The adapter's two files are copied as they
are. Ludwig needs Python 3.12 and an environment of its own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pandas
from ludwig.api import LudwigModel

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "engine/demo/base"
WEIGHTS = "model/model_weights"  # below the folder of a training run
KEPT = ROOT / "tests/data/ludwig" / WEIGHTS
NAME = "demo"  # of the base model, in the adapter's files
FILES = ("adapter_config.json", "adapter_model.safetensors")

CONFIG: dict[str, Any] = {
    "model_type": "llm",
    "base_model": NAME,
    "adapter": {"type": "lora", "r": 2, "alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "prompt": {"template": "{question}"},
    "input_features": [{"name": "question", "type": "text"}],
    "output_features": [{"name": "answer", "type": "text"}],
    "trainer": {
        "type": "finetune",
        "epochs": 4,
        "batch_size": 4,
        "learning_rate": 0.02,
        "enable_profiling": False,
    },
    "backend": {"type": "local"},
}
ROWS = pandas.DataFrame(
    {
        "question": [f"Tom has {number} apples. How many apples?" for number in range(24)],
        "answer": [f"{number} red apples." for number in range(24)],
        "split": [0] * 16 + [1] * 4 + [2] * 4,
    }
)


def main() -> None:
    """Trains in a temporary folder, with relative paths, and copies `FILES`."""
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        shutil.copytree(BASE, NAME)
        model = LudwigModel(CONFIG)
        trained = model.train(dataset=ROWS, output_directory="results", random_seed=1)
        saved = Path(trained.output_directory, WEIGHTS)
        for name in FILES:
            shutil.copyfile(saved / name, KEPT / name)
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
