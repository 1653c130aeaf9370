"""Wan2.1 building blocks, the teacher, and the streaming student (ETM + SDD)."""
