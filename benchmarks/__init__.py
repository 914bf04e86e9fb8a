"""Scripts behind the numbers that the documentation quotes; anyone can run them again."""
