"""Running the reverse chain: NumPy and a backend, never torch."""
