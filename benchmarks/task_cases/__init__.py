"""The cases of tasks.py."""
