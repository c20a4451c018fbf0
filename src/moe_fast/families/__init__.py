"""Names and meanings: what each model family calls its tensors and its configuration."""
