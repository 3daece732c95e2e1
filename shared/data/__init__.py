"""From files of a radiology department to slices on the training device: readers, store, splits, dataset, sampler."""
