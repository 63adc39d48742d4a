"""Sweeps: many runs from one file, on Ray Tune; resumable, summed up in one table. The door is `sweep.run_sweep`."""
