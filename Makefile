PYTHON ?= python3
VENV = .venv

.PHONY: help demo test clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' Makefile

demo:  ## two nodes talk: logger, call, a handle that travels (needs nothing but python3)
	$(PYTHON) distconc.py demo

test: $(VENV)/ready  ## run all tests (sets up .venv with hypothesis first)
	$(VENV)/bin/python test_distconc.py

$(VENV)/ready:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check hypothesis
	touch $@

clean:  ## remove what the others made
	rm -rf $(VENV) .hypothesis .mypy_cache .pytest_cache __pycache__
