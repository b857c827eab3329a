"""Rounding weights so that outputs stay."""
