"""Generation for many adapters in one batch."""
