"""What the kernels will cost on GPUs that are not here: machine code, cache traffic, launches and host time."""
