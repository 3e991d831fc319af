"""The parts that models are put together from, each told the groups it communicates over."""
