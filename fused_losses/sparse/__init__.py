"""Sparse-plus-rank-one gradients: the softmax that is kept (softmax), what is certified (certificate), the products
(gradients)."""
