"""Evaluation of detections: the tables, the assignment to objects, AP and FROC."""
