"""Readers: one function per source, from its own files to Examples; rows that cannot be used are listed."""
