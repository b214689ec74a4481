"""What a person runs: ``python -m pipelines.NAME --help``."""
