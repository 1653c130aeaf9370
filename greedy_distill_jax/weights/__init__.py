"""Weights in and out: Wan's own names, diffusers' names, `.pt` students, and a student that runs in PyTorch.

`names` is the one mapping table, `files` reads tensors, `source` reads any format as a tree of ours, `load` places it
on devices and compares two sources, `write` writes the other formats, `torch_student` is the PyTorch file that travels
with an exported student.
"""
