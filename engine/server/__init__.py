"""The HTTP front: the APIs of LoRAX and OpenAI on one backend."""
