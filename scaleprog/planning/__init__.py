"""What a recipe would train and what that would cost, before training starts."""
