"""Where work runs: a local process or a SLURM job.

`resources.py` reads the `[slurm]` table of a config; `launch.py` submits a wordless command through submitit,
sets up the rendezvous of its tasks, requeues it after preemption and follows it to its end. No other room
reads `SLURM_*` variables: elsewhere the world is `RANK`, `LOCAL_RANK` and `WORLD_SIZE`.
"""
