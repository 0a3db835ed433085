"""Tests on the kernels that distributions ship, in virtual machines."""
