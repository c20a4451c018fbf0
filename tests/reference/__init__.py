"""Plain twins of the kernels, a module each, written like their definitions: slow, easy to read."""
