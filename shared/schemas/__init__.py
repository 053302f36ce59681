"""Configurations of commands that shared/config.py does not hold."""
