"""Tables and pictures of runs. Imports no torch."""
