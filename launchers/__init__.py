"""Programs that start the ranks of a run; all of them call the same function in every rank."""
