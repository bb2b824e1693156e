"""Programs that start the ranks of a run. All of them call the same function in every rank."""
