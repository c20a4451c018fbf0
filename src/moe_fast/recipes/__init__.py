"""Recipe files as build requests."""
