"""Flow-matching mathematics: plain fp32 functions that know no model."""
