"""Packed models: files, modules, the transformers plug-in, dense tensors of packed ones."""
