"""What drives the filters that will go to zero, shared over the ranks."""
