"""Which images there are, in what order, and their bytes."""
