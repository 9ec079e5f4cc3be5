"""Shapes (T, in_features, out_features) that the tests share."""

SMALL = [
    (32, 64, 48),  # multiples of 16
    (37, 64, 48),  # a partial tile of tokens
    (33, 29, 17),  # nothing is a multiple of anything: no TMA
    (1, 16, 32),  # one token
    (130, 40, 72),  # more than one chunk of rows
    (5, 1, 1),  # one feature
]

EMPTY = [(0, 16, 32), (4, 0, 8), (4, 8, 0)]
