"""The CUDA backend's own launches into the simulator: its objects that ship, over a stand-in for CUDA's runtime."""
