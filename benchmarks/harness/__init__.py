"""What every figure goes through: the gate, the timing, the roofline, the rows."""
