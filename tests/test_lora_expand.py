"""Edges and errors of lora_expand."""
