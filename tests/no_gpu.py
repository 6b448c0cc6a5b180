"""What hides every GPU from a process and from its children; imports nothing, so that it can be set before torch."""

NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
"""Variables of NVIDIA's and AMD's libraries, with the value that names no GPU."""
