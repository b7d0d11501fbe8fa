"""Deployments, played through: the real scripts, shell and AWS CLI against a simulated AWS.

``cloud`` is that AWS. It answers in the services' own wire formats and refuses what CloudFormation
refuses; its service's tasks are real ``server.py`` processes. ``docker`` stands in for Docker, and
``person`` is the person at the shell, in a folder of their own.
"""
