"""The shape of a step, and the shapes that steps are captured in.

An eager step has exactly the shape that it needs. A captured step is padded to one of a few shapes, by its decoding
rows and by its chunk tokens. The shapes are few enough to capture all at start, and near enough to each other that
padding costs little.
"""

from __future__ import annotations

from typing import NamedTuple

# Decoding rows of the captured steps with chunks; the number of all rows is added.
MIXED_DECODES = (16, 32, 48, 64, 72, 80, 88, 96, 112, 128, 160, 192)
CHUNK_TOKENS = (64, 128, 256, 512, 1024, 2048)
MOST_WITH_DECODES = (
    256  # chunk tokens with many decoding rows; larger chunks are captured for few rows only
)
LEAST_CHUNK = 16  # tokens; a bucket has room for as many chunks of this size as its tokens allow
FEW_TOKENS = 256  # up to which a step uses the kernels for few tokens (csrc/cuda/linear.h, lora.h)


class Shape(NamedTuple):
    """The size of a step, or the room that a captured step has."""

    decodes: int  # sequences of one token each, before all others
    chunks: int  # other sequences
    tokens: int
    outputs: int  # tokens whose logits are wanted; 0 without chunks, when all tokens are outputs

    @property
    def sequences(self) -> int:
        return self.decodes + self.chunks

    @property
    def segments(self) -> int:
        """Adapter segments of the tokens: at most one per sequence."""
        return self.sequences

    @property
    def output_segments(self) -> int:
        """Adapter segments of the outputs: at most one per sampled sequence and one per scored sequence."""
        return min(self.outputs, 2 * self.sequences)

    @property
    def sizes(self) -> dict[str, int]:
        """The number of words of each field of `engine.runner.inputs.Inputs`, in the order of the words."""
        return {
            "rows": self.sequences,
            "first": self.sequences,
            "cu_seqlens_q": self.sequences + 1,
            "outputs": self.outputs,
            "sampled_rows": self.outputs,
            "sampled_lengths": self.outputs,
            "slots": self.segments,
            "segment_starts": self.segments + 1,
            "output_slots": self.output_segments,
            "output_segment_starts": self.output_segments + 1,
        }

    @property
    def words(self) -> int:
        return sum(self.sizes.values())

    def holds(self, needed: Shape) -> bool:
        """Whether a step of the shape `needed` can be padded to this one. Decode and chunk tokens count separately."""
        own, other = (s._replace(tokens=s.tokens - s.decodes) for s in (self, needed))
        return all(room >= size for room, size in zip(own, other, strict=True))


def decode_shapes(max_rows: int) -> list[Shape]:
    """The captured steps that only decode, in rising order up to `max_rows`."""
    sizes = [1, 2, 4, *range(8, min(max_rows, 128), 8), *range(128, max_rows, 32)]
    sizes = sorted({size for size in sizes if size < max_rows} | {max_rows})
    return [Shape(size, 0, size, 0) for size in sizes]


def chunk_bounds(max_rows: int, most: int) -> list[int]:
    """Chunk tokens of a step with 0 .. `max_rows` decoding rows: `most`, or fewer to keep the step at FEW_TOKENS.

    A larger step takes longer per chunk token: 45 us against 33, measured with 160 rows. The bound is `most` if the
    rows leave less than the smallest bucket of chunk tokens.
    """
    sizes = _mixed_decodes(max_rows)
    padded = [next(size for size in sizes if size >= rows) for rows in range(max_rows + 1)]
    return [min(most, _few_chunk_tokens(decodes) or most) for decodes in padded]


def mixed_shapes(max_rows: int, max_tokens: int) -> list[Shape]:
    """The captured steps with chunks, in order of tokens, up to the first with room for `max_tokens` chunk tokens."""
    decodes = _mixed_decodes(max_rows)
    least = CHUNK_TOKENS[0]
    tokens = [size for size in CHUNK_TOKENS if size == least or size // 2 < max_tokens]
    shapes = []
    for decode in decodes:
        few = min(_few_chunk_tokens(decode) or least, CHUNK_TOKENS[1], tokens[-1])
        for of_chunks in {*tokens, few}:
            if of_chunks > MOST_WITH_DECODES and decode > decodes[0]:
                continue
            chunks = min(of_chunks // LEAST_CHUNK, max_rows)
            shapes.append(Shape(decode, chunks, decode + of_chunks, decode + chunks))
    return sorted(shapes, key=lambda shape: (shape.tokens, shape.decodes))


def _mixed_decodes(max_rows: int) -> list[int]:
    return sorted({size for size in MIXED_DECODES if size < max_rows} | {max_rows})


def _few_chunk_tokens(decodes: int) -> int | None:
    """Chunk tokens that keep a step with `decodes` decoding rows at FEW_TOKENS; None if they are less than a bucket."""
    room = FEW_TOKENS - decodes
    return room if room >= CHUNK_TOKENS[0] else None


def decode_words(max_rows: int) -> int:
    """The number of words of the inputs of a step that only decodes."""
    return Shape(max_rows, 0, max_rows, 0).words


def mixed_words(max_rows: int, max_tokens: int) -> int:
    """The number of words of the inputs of any step with chunks, captured or not."""
    eager = Shape(max_rows, max_rows, max_rows + max_tokens, max_rows + max_tokens)
    return max(shape.words for shape in [eager, *mixed_shapes(max_rows, max_tokens)])
