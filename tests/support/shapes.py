"""Shapes (T, in_features, out_features) that the tests share."""

SMALL = [
    (32, 64, 48),  # multiples of 16
    (37, 64, 48),  # a partial tile of tokens
    (33, 29, 17),  # nothing is a multiple of anything: no TMA
    (1, 16, 32),  # one token
    (130, 40, 72),  # more than one chunk of rows
    (5, 1, 1),  # one feature
]

FUSED = [(8, 16, 8), (300, 72, 264), (129, 64, 520)]
"""Sizes that the fused GEMMs take: rows of 16 bytes, more than one tile of either kind, partial tiles."""

PRODUCTION = [(4097, 72, 2312), (769, 2312, 2312)]
"""What reaches the large tiles on a card of 132 multiprocessors, Triton's by the first and csrc's by the second.

An odd count of tile rows, the last of one row, and a last tile of 8 columns. For a GPU: the CPU's tests force each tile on a
small shape.
"""

EMPTY = [(0, 16, 32), (4, 0, 8), (4, 8, 0)]
