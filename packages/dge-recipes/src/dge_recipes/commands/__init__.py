"""The command lines: each parses its arguments, calls an engine and prints what it returns."""
