"""Weights and files of other libraries."""
