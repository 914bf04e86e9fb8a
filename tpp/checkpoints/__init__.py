"""Files that hold networks: ours, and those of others."""
