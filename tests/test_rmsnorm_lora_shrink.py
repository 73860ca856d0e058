"""Edges and errors of rmsnorm_lora_shrink."""
