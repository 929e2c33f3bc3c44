"""How much a step has room for, and the shapes that steps are captured in.

An eager step has the shape that fits it. A captured one is padded to one of a few shapes, by the rows that decode and
by the tokens of chunks: few enough to capture all at start, near enough to each other that padding costs little.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

MIXED_DECODES = (16, 64)  # rows that decode beside chunks; and as many rows as there are
CHUNK_TOKENS = (128, 256, 512, 1024, 2048)
LEAST_CHUNK = 16  # tokens: a bucket of tokens has room for chunks of this size


class Shape(NamedTuple):
    """Room of a step."""

    decodes: int  # sequences of one token each, ahead of all others
    chunks: int  # other sequences
    tokens: int
    outputs: int  # tokens whose logits are wanted; without chunks all are, and this is 0
    segments: int  # of adapters, over the tokens
    output_segments: int  # and over the outputs

    @property
    def sequences(self) -> int:
        return self.decodes + self.chunks

    @property
    def sizes(self) -> list[int]:
        """Words of each field of `engine.runner.inputs.Inputs`."""
        sequences, outputs = self.sequences, self.outputs
        segments, of_outputs = self.segments, self.output_segments
        return [
            *(sequences, sequences, sequences + 1, outputs, outputs, outputs),
            *(segments, segments + 1, of_outputs, of_outputs + 1),
        ]

    @property
    def words(self) -> int:
        return sum(self.sizes)

    def holds(self, needed: Shape) -> bool:
        """Whether a step of the other shape can be padded to this one, each kind of token for itself."""
        own, other = (s._replace(tokens=s.tokens - s.decodes) for s in (self, needed))
        return all(room >= size for room, size in zip(own, other, strict=True))


def room_for(decodes: int, chunks: int, tokens: int, outputs: int, most: int) -> Shape:
    """The shape that holds every step of so many rows, chunks, tokens and outputs, in segments of up to `most`."""
    segments = decodes + chunks + (tokens - decodes) // most
    return Shape(decodes, chunks, tokens, outputs, segments, outputs)


def decode_shapes(max_rows: int, most: int) -> list[Shape]:
    """Steps of one token for each row, rising to `max_rows`."""
    sizes = [1, 2, 4, *range(8, min(max_rows, 128), 8), *range(128, max_rows, 32)]
    sizes = sorted({size for size in sizes if size < max_rows} | {max_rows})
    return [room_for(size, 0, size, 0, most) for size in sizes]


def mixed_shapes(max_rows: int, max_tokens: int, most: int) -> list[Shape]:
    """Steps of rows that decode and of chunks, by rising tokens, up to the first that holds `max_tokens` of them."""
    decodes = sorted({size for size in MIXED_DECODES if size < max_rows} | {max_rows})
    least = CHUNK_TOKENS[0]
    tokens = [size for size in CHUNK_TOKENS if size == least or size // 2 < max_tokens]
    shapes = []
    for decode, of_chunks in product(decodes, tokens):
        chunks = min(of_chunks // LEAST_CHUNK, max_rows)
        shapes.append(room_for(decode, chunks, decode + of_chunks, decode + chunks, most))
    return sorted(shapes, key=lambda shape: (shape.tokens, shape.decodes))


def decode_words(max_rows: int) -> int:
    """Words for the inputs of a step that only decodes."""
    return room_for(max_rows, 0, max_rows, 0, 1).words


def mixed_words(max_rows: int, max_tokens: int) -> int:
    """Words for the inputs of any step with chunks, captured or not."""
    eager = room_for(max_rows, max_rows, max_rows + max_tokens, max_rows + max_tokens, 1)
    return max(shape.words for shape in [eager, *mixed_shapes(max_rows, max_tokens, 1)])
