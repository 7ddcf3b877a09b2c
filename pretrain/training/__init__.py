"""The training loop, and what it needs: tasks, checkpoints, processes, logs."""
