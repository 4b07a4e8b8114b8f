"""Quantised checkpoints: what a folder's description and tensors say, and the form each weight takes on the device.

`forms` and `integers` hold the words, `description` and one file a checkpoint format read `quantization_config`, `detect`
(for integers with `integer_layers`) checks it against the safetensors headers, `at_load` decides what `--quantization` makes.
`unpack` reads stored integers and `quantise` makes FP8 and integers of 16-bit weights: these two import torch.
"""
