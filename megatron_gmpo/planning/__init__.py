"""Plan a layout without GPUs: memory, traffic and time of a step."""
