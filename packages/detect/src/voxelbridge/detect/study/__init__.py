"""The experiment matrix: stated in one file, worked off job by job, told and reported."""
