"""What the TPU kernels over chunks of tokens are made of."""
