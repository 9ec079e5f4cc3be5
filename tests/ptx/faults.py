"""What the simulator raises."""


class Fault(Exception):
    """A kernel does what PTX does not allow, or what the simulator does not know."""
