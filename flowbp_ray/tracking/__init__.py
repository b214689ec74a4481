"""Where a run's parameters, metrics, pictures and files go: one MLflow run per alignment.

Nothing is imported here, so that the place can be checked (``store``) before MLflow is loaded (``run``).
"""
