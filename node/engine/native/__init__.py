"""Decoder layers in C++ for CPUs: packed weights, a half-float KV cache, the same bits in any batch."""
