"""Triton kernels; imports torch and triton, and nothing of fastrl."""
