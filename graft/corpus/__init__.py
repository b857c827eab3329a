"""Builds datasets from documentation."""
