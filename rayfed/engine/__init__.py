"""Where a run happens: Ray actors with supervision, or this process; the same bits either way."""
