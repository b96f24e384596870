"""Post-training int8: ranges from one pass over calibration images, corrections, Q/DQ graphs."""
