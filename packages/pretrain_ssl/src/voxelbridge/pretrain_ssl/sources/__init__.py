"""Where pre-training images come from: nnssl collections, CT-RATE, BIDS, raw data sets, folders."""
