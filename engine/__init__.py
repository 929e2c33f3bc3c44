"""The LoRAX inference engine: one base model, many LoRA adapters, every request in one batch."""

__version__ = "0.1.0"
