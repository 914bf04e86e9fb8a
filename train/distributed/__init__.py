"""Ranks, devices and engines."""
