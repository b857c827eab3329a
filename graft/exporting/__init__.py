"""What leaves: adapters for other tools, fused and merged models."""
