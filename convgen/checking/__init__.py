"""Whether results are right: against float64, and CUDA kernels without a GPU."""
