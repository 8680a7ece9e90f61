"""The computations behind the figures: each reads checkpoints, traces and run directories, and never trains.

Every module has ``compute_…`` functions that return tables (pandas) and ``draw_…`` functions that make a figure from
such tables alone, so that no number is only in a picture.
"""
