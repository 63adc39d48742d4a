"""The fault-injection harness: seeded faults of processes, disks, stores, settings and data, used by slow tests."""
