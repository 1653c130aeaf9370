"""Weights in and out: Wan's own names, diffusers' names, `.pt` students, and a student that runs in PyTorch.

`names` is the one mapping table of the transformers, `vae_names` that of the autoencoders. `tensor_files` opens files
of tensors, `open` recognises any format as a `source` of our tree; `load` places it on devices, `verify` compares two,
`inspect` describes one, `write` writes the other formats, `torch_student` is the PyTorch file that travels with an
exported student. `pipeline` reads the other parts of a model folder, and codecs.
"""
