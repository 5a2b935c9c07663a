"""How a model is changed and given back: what a declaration may say, the hooks it becomes, and the report."""
