"""Published experiments, one file each: settings, published numbers, and how the two are held against each other."""
