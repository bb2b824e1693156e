"""The ranks of a run: where they meet, how they agree, and when they stop."""
