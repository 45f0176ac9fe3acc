"""What each kind of media brings to the evaluation: metrics, baseline, and how an item is read, measured and shown."""
