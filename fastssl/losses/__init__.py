"""The losses: a family a file."""
