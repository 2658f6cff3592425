"""Convolution blocks: torch, C and Triton."""
