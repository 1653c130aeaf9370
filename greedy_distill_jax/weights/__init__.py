"""Weights in and out: Wan's own names, diffusers' names, `.pt` students, and a student that runs in PyTorch.

`names` is the one mapping table of the transformers, `vae_names` that of the autoencoders. `tensor_files` opens files
of tensors (`fp8` makes numbers of FP8, `others` names what is none of ours), `open` recognises any format as a `source`
of our tree and `kind` whether it is a teacher or a causal student; `lora` merges adapters into one, `adapter` writes
them; `load` places it on devices, `verify` compares two, `inspect` describes one, `health` says what cannot be right,
`write` writes the other formats, `torch_networks` and `torch_student` are joined into the PyTorch file that travels
with an exported student. `pipeline` reads the other parts of a model folder, and codecs.
"""
