"""Layers with a backward of their own; any optimizer and any rule trains them."""
