"""What a run needs before it runs: memory by term, the moment of the peak, work to be done."""
