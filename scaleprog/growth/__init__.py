"""How a network grows: pure values and arithmetic, no tensor of the model in sight."""
