"""How large, how fast and how trainable a network is."""
