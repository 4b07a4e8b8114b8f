"""Quantised checkpoints: what a folder's description and tensors say, and the form each weight takes on the device.

`forms` holds the words, `description` and one file a checkpoint format read `quantization_config`, `detect` checks it
against the safetensors headers, `quantise` turns 16-bit weights into FP8. All but `quantise` import no torch.
"""
