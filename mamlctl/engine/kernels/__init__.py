"""Convolution blocks and their derivatives in torch, C and Triton."""
