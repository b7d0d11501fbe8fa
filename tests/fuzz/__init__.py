"""Fuzzing: ``python -m tests.fuzz --seconds 600``.

Three targets (tests/fuzz/targets.py) take any bytes and fail if something is not as promised. With
atheris their mutation is guided by coverage; where there is none, hypothesis invents the bytes.
``corpus`` has an input of each kind to begin with, and whatever was found to go wrong since.
tests/test_fuzz.py replays it all.
"""
