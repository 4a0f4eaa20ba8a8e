"""What the commands do: a plain function for each, which takes the values of the command's options by name."""
