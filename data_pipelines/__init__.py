"""Images from class folders to batches on every rank, in an order that is a pure function."""
