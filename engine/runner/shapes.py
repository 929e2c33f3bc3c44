"""How much a step has room for, and the shapes that steps are captured in.

An eager step has the shape that fits it. A captured one is padded to one of a few shapes, by the rows that decode and
by the tokens of chunks: few enough to capture all at start, near enough to each other that padding costs little.
"""

from __future__ import annotations

from typing import NamedTuple

# rows that decode beside chunks; and all that there are
MIXED_DECODES = (16, 32, 48, 64, 72, 80, 88, 96, 112, 128, 160, 192)
CHUNK_TOKENS = (64, 128, 256, 512, 1024, 2048)
MOST_BESIDE = 256  # chunk tokens beside many rows that decode; the larger ones are for few rows
LEAST_CHUNK = 16  # tokens: a bucket of tokens has room for chunks of this size
FEW_TOKENS = 256  # of a step whose kernels are those for few tokens (csrc/cuda/linear.h, lora.h)


class Shape(NamedTuple):
    """Room of a step."""

    decodes: int  # sequences of one token each, ahead of all others
    chunks: int  # other sequences
    tokens: int
    outputs: int  # tokens whose logits are wanted; without chunks all are, and this is 0

    @property
    def sequences(self) -> int:
        return self.decodes + self.chunks

    @property
    def segments(self) -> int:
        """Of adapters, over the tokens: at most one a sequence."""
        return self.sequences

    @property
    def output_segments(self) -> int:
        """And over the outputs: at most one a sequence that is sampled, and one a sequence that is scored."""
        return min(self.outputs, 2 * self.sequences)

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


def decode_shapes(max_rows: int) -> list[Shape]:
    """Steps of one token for each row, rising to `max_rows`."""
    sizes = [1, 2, 4, *range(8, min(max_rows, 128), 8), *range(128, max_rows, 32)]
    sizes = sorted({size for size in sizes if size < max_rows} | {max_rows})
    return [Shape(size, 0, size, 0) for size in sizes]


def chunk_bounds(max_rows: int, most: int) -> list[int]:
    """Tokens of chunks beside 0 .. `max_rows` rows that decode: `most`, or what keeps a captured step at FEW_TOKENS.

    One that goes beyond takes longer for each token of a chunk: 45 us against 33, measured with 160 rows.
    Beside rows that leave less than the smallest bucket of chunks, it is `most`.
    """
    sizes = _mixed_decodes(max_rows)
    padded = [next(size for size in sizes if size >= rows) for rows in range(max_rows + 1)]
    return [min(most, _few_beside(decodes) or most) for decodes in padded]


def mixed_shapes(max_rows: int, max_tokens: int) -> list[Shape]:
    """Steps of rows that decode and of chunks, by rising tokens, up to the first that holds `max_tokens` of them."""
    decodes = _mixed_decodes(max_rows)
    least = CHUNK_TOKENS[0]
    tokens = [size for size in CHUNK_TOKENS if size == least or size // 2 < max_tokens]
    shapes = []
    for decode in decodes:
        few = min(_few_beside(decode) or least, CHUNK_TOKENS[1], tokens[-1])
        for of_chunks in {*tokens, few}:
            if of_chunks > MOST_BESIDE and decode > decodes[0]:
                continue
            chunks = min(of_chunks // LEAST_CHUNK, max_rows)
            shapes.append(Shape(decode, chunks, decode + of_chunks, decode + chunks))
    return sorted(shapes, key=lambda shape: (shape.tokens, shape.decodes))


def _mixed_decodes(max_rows: int) -> list[int]:
    return sorted({size for size in MIXED_DECODES if size < max_rows} | {max_rows})


def _few_beside(decodes: int) -> int | None:
    """Tokens of chunks with which a step of so many rows has FEW_TOKENS, if they are a bucket's worth."""
    room = FEW_TOKENS - decodes
    return room if room >= CHUNK_TOKENS[0] else None


def decode_words(max_rows: int) -> int:
    """Words for the inputs of a step that only decodes."""
    return Shape(max_rows, 0, max_rows, 0).words


def mixed_words(max_rows: int, max_tokens: int) -> int:
    """Words for the inputs of any step with chunks, captured or not."""
    eager = Shape(max_rows, max_rows, max_rows + max_tokens, max_rows + max_tokens)
    return max(shape.words for shape in [eager, *mixed_shapes(max_rows, max_tokens)])
