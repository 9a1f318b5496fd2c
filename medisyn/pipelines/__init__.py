"""Pipelines that are published verbatim: each file is self-contained and travels inside the models it describes."""
