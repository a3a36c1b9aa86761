"""Engine pieces that the recipes share."""
