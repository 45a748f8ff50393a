"""Images, raw data sets, the case store and the batches drawn from it (extra `[data]`)."""
