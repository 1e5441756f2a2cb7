"""The losses: one a file, function and Module side by side, and what several share."""
