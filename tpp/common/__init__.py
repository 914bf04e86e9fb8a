"""The ground: errors, files, reading, settings. It imports nothing of the project."""
