"""Engines are installed in environments of their own: of others' tests nothing is imported there."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("llama_cpp") else ["test_gguf.py"]
