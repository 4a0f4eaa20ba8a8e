"""Training the ε-network in PyTorch, and running it there as the reference."""
