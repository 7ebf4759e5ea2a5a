"""Experts, router, codec and training as functions: tensors in, tensors out."""
