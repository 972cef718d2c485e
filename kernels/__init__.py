"""Tensors in, tensors out: the batched low-rank kernels, the 4-bit products and paged attention."""
