"""The engine: generates with many adapters of one base model in one batch."""
