"""Converters: from the downloads and lists people have to a raw data set folder."""
