"""Adapters: what is trained on a frozen model, attached to it, saved and loaded."""
