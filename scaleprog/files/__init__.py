"""Reads, writes and shows untrusted files: whole, within bounds, as plain text. Imports no torch."""
