"""The data/backends room."""
