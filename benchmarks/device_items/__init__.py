"""The items of ``benchmarks/device.py``, one file each with ``run(record)``."""
