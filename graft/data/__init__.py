"""Data: from files to rows, from rows to tokens, from tokens to batches."""
