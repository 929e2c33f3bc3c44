"""The fixed layout of adapters in memory: what the image writer, the kernels and the reference agree on.

Everything is rank-major. For one group (one fused linear with up to three targets) of one layer:

    A      [r_0 + r_1 + r_2, K]     one row per rank; targets stacked in order
    B_t    [r_t, N_t]               target after target

Row lengths are padded to `ALIGN` bytes, ranks never. An embedding's A is `[vocab, r]`, its B `[r, hidden]`.
A record is eight int32 words per (slot, layer, group); offsets are in units of `ALIGN` bytes from the start of the
arena (in an image: from the start of its data). Rank 0 means that the adapter leaves the target alone; slot 0 is
the base model, whose records are all zero.
"""

from __future__ import annotations

ALIGN = 16  # bytes
MAX_TARGETS = 3  # per group
MAX_RANK = 65535  # a rank is a uint16 in the record
RECORD_WORDS = 8

# words of a record
WORD_A = 0  # offset of A
WORD_B = 1  # offset of B of the first target
WORD_EXTRA = 2  # offset of per-output extras (bias, DoRA scale); 0: none
WORD_RANKS = 3  # rank 0 | rank 1 << 16
WORD_RANK2 = 4  # rank 2 | flags << 16
WORD_SCALE = 5  # float32 bits of the three targets' scales


def padded(num_bytes: int) -> int:
    """`num_bytes` rounded up to the alignment."""
    return (num_bytes + ALIGN - 1) // ALIGN * ALIGN


def row_stride(length: int, element_size: int) -> int:
    """Elements from one row of A or B to the next."""
    return padded(length * element_size) // element_size
