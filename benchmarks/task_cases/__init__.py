"""The tasks of cases/tasks.py."""
