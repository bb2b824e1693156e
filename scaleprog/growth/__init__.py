"""How a network grows: pure values and arithmetic, without the model's tensors."""
