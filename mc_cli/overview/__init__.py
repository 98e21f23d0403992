"""Shows a person sizes and losses of a work directory, of several, and of figures that others measured.

Reads artifacts and solves allocate's programme; no weight is touched and nothing in a work directory is written.
"""
