"""Files that appear whole, and tensors that stay on disk."""
