"""Making data sets: archives, class folders and shards."""
