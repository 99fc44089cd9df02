"""kernels/compiled."""
