"""What this machine computes with: BLAS, MLX's CPU backend, worker processes."""
