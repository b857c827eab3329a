"""Exporting: adapters in other tools' formats, merged or fused adapters, uploads to the Hub."""
