"""Known holes in packages and code, and pins without hashes: ``python -m tests.audit``."""
