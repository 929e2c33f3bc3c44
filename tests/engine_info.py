"""The description of an engine that tests put in its place; `msgspec.structs.replace` changes fields."""

from __future__ import annotations

from engine.messages import EngineInfo

INFO = EngineInfo(
    model_id="tiny/base",
    model_type="llama",
    revision=None,
    dtype="float32",
    device="cpu",
    device_name="test",
    vocab_size=400,
    max_input_length=200,
    max_total_tokens=256,
    max_batch_total_tokens=4096,
    max_batch_size=8,
    max_step_tokens=64,
    block_size=16,
    adapter_bytes=1 << 20,
    host_bytes=1 << 22,
    backends={"attention": "reference"},
    memory_plan=[("weights", 1000), ("kv", 2000)],
    targets=["q_proj"],
)
