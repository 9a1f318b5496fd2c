"""Images in: files and tables (`sources`, `loading`, `medical`), tensors (`preprocessing`), caches (`cache`)."""
