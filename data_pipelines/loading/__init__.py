"""From bytes to batches: DALI, torchvision, augmentation and mixing."""
