"""Load, and peers side by side: ``python -m bench``."""
