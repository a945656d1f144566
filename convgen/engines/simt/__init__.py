"""Register-tiled FFMA kernels for any CUDA GPU since sm_75."""
