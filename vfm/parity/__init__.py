"""Comparisons with trusted libraries, for tests and for `experiments.certify`; the libraries are the extra `parity`."""
