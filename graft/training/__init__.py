"""One run: options, loss, step, memory, checkpoints, reports."""
