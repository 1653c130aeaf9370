"""The parts of ``benchmarks/bad_inputs.py``: what is made once, the kinds of cases, the judge of one."""
