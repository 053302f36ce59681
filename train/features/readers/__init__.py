"""Reads what `sagsae features` wrote, within bounds: it can come from anybody."""
