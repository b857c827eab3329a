"""Datasets from documentation."""
