"""The engine's ops: `torch.ops.lorax.*`, their references, and the extension that serves them."""

from engine.ops import schemas as schemas
from engine.ops.extension import ExtensionStatus as ExtensionStatus
from engine.ops.extension import backends as backends
from engine.ops.extension import load as load
from engine.ops.extension import load_cuda as load_cuda
from engine.ops.extension import require_cuda as require_cuda

load()
load_cuda()
