"""What a run directory holds: its network, its results and their figures; the commands are in the pipeline."""
