"""The HTTP front: LoRAX's and OpenAI's routes on one backend."""
