"""Launching: what turns an allocation or a command line into ranks."""
