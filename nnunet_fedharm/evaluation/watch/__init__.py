"""A federation while it runs: in the terminal, as a page that refreshes itself, and as TensorBoard scalars."""
