"""Measure agentray: each module here prints a table and writes what it measured as JSON."""
