"""Where the code runs: processes, logs, experiment trackers."""
