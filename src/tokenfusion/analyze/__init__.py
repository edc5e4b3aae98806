"""What a model does inside: its attention maps recorded, and whether they collapse with depth."""
