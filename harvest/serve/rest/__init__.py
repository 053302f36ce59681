"""The REST interface of the activation cache: one module per subject."""
