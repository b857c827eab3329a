"""Files: atomic writing, and reading tensors without loading them all."""
