"""``visiontok bench``: what methods cost and save in time, memory and FLOPs, beside the stock model at its best."""
