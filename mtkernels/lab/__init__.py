"""Run, check and measure GPU kernels on a machine without a GPU."""
