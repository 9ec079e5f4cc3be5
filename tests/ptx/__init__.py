"""A functional simulator of PTX: what a compiled kernel computes, under any timing that PTX allows (README.md)."""
