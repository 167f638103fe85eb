"""A run directory: its network, its results and their figures, and the commands that make them."""
