"""Base models and tokenizers: found, opened, loaded."""
