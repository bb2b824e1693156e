"""A run directory: its records, its lease, its checkpoints."""
