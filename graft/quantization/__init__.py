"""Chooses bits, rounds weights, and measures what rounding costs."""
