"""Rows, ledgers, files and records: what is taught, as data."""
