"""Training: configuration, stages, the loop, checkpoints, monitoring, reports."""
