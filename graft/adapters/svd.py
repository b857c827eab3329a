"""Truncated singular value decomposition of large weights."""

import mlx.core as mx

# Up to this many rows or columns a decomposition is exact; beyond, by subspace iteration.
LARGEST_EXACT_SVD = 1024


def truncated_svd(matrix: mx.array, rank: int) -> tuple[mx.array, mx.array, mx.array]:
    """U (rows, rank), S (rank,) and V^T (rank, columns) of the largest singular values.

    Exact up to 1024 rows or columns; beyond, by randomized subspace iteration, as in Halko et al.,
    "Finding Structure with Randomness" (2009), https://arxiv.org/abs/0909.4061, algorithm 4.4,
    with 8 iterations and 16 directions more than requested.
    """
    with mx.stream(mx.cpu):
        if min(matrix.shape) <= LARGEST_EXACT_SVD:
            u, s, vt = _thin_svd(matrix)
            return u[:, :rank], s[:rank], vt[:rank]
        width = min(rank + 16, *matrix.shape)
        basis = matrix @ mx.random.normal((matrix.shape[1], width), key=mx.random.key(0))
        for _ in range(8):
            basis = mx.linalg.qr(matrix.T @ mx.linalg.qr(basis)[0])[0]
            basis = matrix @ basis
        q = mx.linalg.qr(basis)[0]
        u, s, vt = _thin_svd(q.T @ matrix)
        return q @ u[:, :rank], s[:rank], vt[:rank]


def _thin_svd(matrix: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The decomposition without the square factor that MLX computes for the longer side."""
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vt = _thin_svd(matrix.T)
        return vt.T, s, u.T
    q, r = mx.linalg.qr(matrix)
    u, s, vt = mx.linalg.svd(r)
    return q @ u, s, vt
