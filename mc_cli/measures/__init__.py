"""Importance measures of one expert, one file each: pure functions of what was captured, no I/O, no models."""
