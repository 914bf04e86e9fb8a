"""What goes with a filter when it goes, and taking it out of a network."""
