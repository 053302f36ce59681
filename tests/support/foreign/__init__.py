"""Files of other tools, made by tests."""
