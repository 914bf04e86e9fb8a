"""ResiNet: edges of a graph rewired for its resilience (arXiv 2110.09035). Nothing imports it."""
