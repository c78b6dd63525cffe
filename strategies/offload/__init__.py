"""Models larger than memory: weights stay on the disk (or in host memory) and pass through two buffers, block by block.

How to read it: stream.py is the engine, sources.py reads files into its buffers, units.py says what passes as one piece and
puts the engine around it, dispatch.py is what users call; placement.py, one folder up, says what lies where.
"""
