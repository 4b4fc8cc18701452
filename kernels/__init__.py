"""The Triton kernels, installed as `infovae_fast.kernels`. Imported only where the Triton backend is chosen."""
