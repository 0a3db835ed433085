"""Differential torture: the same socket program on the kernel path and in the lane."""
