"""Kernels in Triton that the `fused` backend is made of: each joins operations that would be single launches.

A plan at batch 1 is hundreds of operations of microseconds, so launches and trips through memory decide its latency.
Every kernel takes tensors of any batch size; results do not depend on it. Without a GPU they run, slowly, in Triton's
interpreter (TRITON_INTERPRET=1), which is how they are tested.
"""
