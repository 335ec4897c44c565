"""Public libraries: their knobs, their sharp edges, and their code beside gclib's."""
