"""Model folders, opened and looked into."""
