"""The parts of ``benchmarks/faults.py``: the job that faults happen to, kills, other faults, moves of a run."""
