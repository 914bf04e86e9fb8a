"""Networks by name, and their widths."""
