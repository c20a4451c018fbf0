"""Arrays in, pictures and HTML out."""
