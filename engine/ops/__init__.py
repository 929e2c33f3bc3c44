"""The engine's ops: `torch.ops.lorax.*`, their references, and the extension that serves them."""

from engine.ops import schemas as schemas
