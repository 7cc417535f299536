"""Serving: the GPT as a model of vLLM, and what a server checks before a request reaches it.

The modules named vllm_* run inside vLLM and import torch, vLLM and light modules of ours only.
"""
