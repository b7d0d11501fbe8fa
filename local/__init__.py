"""The whole platform on one machine: a stand-in for AWS, sample agents and the real server.

`python -m local` runs it. None of it is in the image.
"""
