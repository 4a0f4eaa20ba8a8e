"""What works on this machine: what is installed and visible, and a chain whose answer is known on every backend."""
