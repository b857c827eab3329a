"""Base models and tokenizers: finding, opening, converting and loading them."""
