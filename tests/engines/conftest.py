"""Engines are installed in environments of their own: of others' tests nothing is imported there."""

from importlib.util import find_spec

_ENGINES = {
    "test_gguf.py": "llama_cpp",
    "test_mlx.py": "mlx_lm",
    "test_compressed_tensors.py": "compressed_tensors",
    "test_gptq.py": "gptqmodel",
    "test_on_ray.py": "ray",
}
collect_ignore = [file for file, engine in _ENGINES.items() if find_spec(engine) is None]
