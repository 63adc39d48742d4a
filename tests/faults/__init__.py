"""The fault-injection harness: seeded faults that tests apply to runs, files, settings and data."""
