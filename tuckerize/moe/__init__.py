"""MoE models: families, layouts of routed experts on disk, routers, and the source model."""
