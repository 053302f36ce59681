"""Stores and runs whose arithmetic is exact."""
