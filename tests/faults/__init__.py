"""Fault injection: bad data, models, settings, files and processes, made by seeded generators."""
