"""A run as a folder that answers alike without it: one file a format, one gate for all."""
