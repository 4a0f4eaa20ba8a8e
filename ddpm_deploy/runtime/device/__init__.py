"""Where a chain runs: the host, or a GPU through CuPy; each with its memory and its stepper."""
