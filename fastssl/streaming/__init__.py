"""The launchers of kernels/, tile by tile in PyTorch."""
