"""Credit: what each stage of a chain should have produced."""
