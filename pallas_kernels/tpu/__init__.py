"""Components of the TPU kernels over chunks of tokens."""
