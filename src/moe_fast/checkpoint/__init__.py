"""Dense checkpoints on disk become one Mixture-of-Experts checkpoint on disk."""
