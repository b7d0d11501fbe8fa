"""The whole platform on one machine: an embedded AWS, sample agents and the real server.

`python -m local` runs it for a person, `local.aws` serves the tests. None of it is in the image.
"""
