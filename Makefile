PYTHON ?= python3
VENV = .venv
NEEDS = $(PYTHON) -c "import sys; sys.version_info >= (3, 10) or sys.exit( \
	'Python 3.10 or later is needed; this one is %d.%d (make PYTHON=python3.12, for instance)' \
	% sys.version_info[:2])"

.PHONY: help demo test check handout bench soak clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' Makefile

demo:  ## two nodes talk: logger, call, a handle that travels (needs nothing but python3)
	@$(NEEDS)
	$(PYTHON) distconc.py demo

test: $(VENV)/ready  ## run all tests (sets up .venv with hypothesis first)
	$(VENV)/bin/python test_distconc.py

check:  ## check solutions (EXERCISE=ring, or all; FILE=mine.py; DIR=class; without: list all)
	@$(NEEDS)
	@$(PYTHON) test_distconc.py check $(EXERCISE) $(if $(FILE),"$(FILE)") $(if $(DIR),"$(DIR)") $(ARGS)

handout:  ## write a copy for students, without solutions (DIR=for_students)
	@$(NEEDS)
	@$(PYTHON) test_distconc.py handout "$(DIR)"

bench: $(VENV)/ready  ## measure beside the bare standard library (ARGS="--sets 5", "--json")
	@$(VENV)/bin/python test_distconc.py bench $(ARGS)

soak: $(VENV)/ready  ## load, then a minute of kills, pauses and cuts (DISTCONC_SOAK=seconds, DISTCONC_SEED)
	@$(VENV)/bin/python test_distconc.py soak

$(VENV)/ready:
	@$(NEEDS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check hypothesis
	touch $@

clean:  ## remove what the others made
	rm -rf $(VENV) .hypothesis .mypy_cache .pytest_cache __pycache__
