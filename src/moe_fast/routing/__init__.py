"""Tokens to experts, over arrays."""
