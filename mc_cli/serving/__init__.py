"""Serving packed models: the plug-in by which vLLM runs them as they are, and a server by the engine that is installed.

vLLM's modules are imported by those files alone whose names begin with `vllm_`, and only where vLLM is running.
"""
