"""Edges and errors of lora_shrink."""
