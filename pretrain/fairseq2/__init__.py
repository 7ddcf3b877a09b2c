"""What needs fairseq2 (extra `fairseq2`, in an environment of its own): the second engine, its asset cards,
our models for its users."""
