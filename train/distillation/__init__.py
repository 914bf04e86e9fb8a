"""Training a network by what another one, its teacher, says of the same images."""
