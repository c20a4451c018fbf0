"""Bytes on disk; knows no model."""
