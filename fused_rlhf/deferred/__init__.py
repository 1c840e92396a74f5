"""Logits that are never there: tensors of shape (..., V) that compute what is asked of them from hidden states and head."""
