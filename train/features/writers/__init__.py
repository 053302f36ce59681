"""Writes what `sagsae features` found in the forms of other tools."""
