"""The blocks and the head on CUDA devices, with kernels in Triton."""
