"""Turns a store into batches: selects rows, orders them, and reads them ahead in windows."""
