"""The decoder, its layers and the checkpoint loaders."""
